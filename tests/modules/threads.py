"""What several threads do at once."""

import threading


def at_once(serve, *arguments):
    """serve(*each) in a thread of its own for each of the arguments' tuples, until all have ended."""
    threads = [threading.Thread(target=serve, args=each) for each in zip(*arguments, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
