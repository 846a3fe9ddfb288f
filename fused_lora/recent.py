"""A dict that forgets what was not used for long."""

from collections.abc import Callable
from threading import Lock


class Recent:
    """What was made under the keys that were used last: at most `most` of them, and at least half as many.

    Two dicts: a key that is used moves to the young one. Where that is half of all, it becomes the old one, and what
    only the old one had is forgotten. So a key that is found costs what it costs in a dict.
    """

    def __init__(self, most: int):
        self.half = most // 2
        self.young: dict[tuple, object] = {}
        self.old: dict[tuple, object] = {}
        self._lock = Lock()

    def get(self, key: tuple, make: Callable[[], object]):
        """What is kept under `key`; made where nothing is, outside of the lock: making may look up other keys."""
        found = self.young.get(key)
        return self._renew(key, make) if found is None else found

    def _renew(self, key: tuple, make: Callable[[], object]):
        found = self.old.get(key)
        if found is None:
            found = make()
        with self._lock:
            if len(self.young) >= self.half:
                self.young, self.old = {}, self.young
            return self.young.setdefault(key, found)
