"""The text that every Python carries: English, and without repeats."""

from fused_lora.pretrain import python_text


def test_docstrings_are_english():
    docstrings = python_text.docstrings()
    assert len(docstrings) > 300_000
    assert docstrings.count(" the ") > len(docstrings) / 500


def test_language_reference_has_each_paragraph_once():
    reference = python_text.language_reference()
    paragraphs = reference.split("\n\n")
    assert len(reference) > 200_000
    assert reference.count(" the ") > len(reference) / 500
    assert len(set(paragraphs)) == len(paragraphs)
    assert python_text.language_reference() == reference


def test_the_file_holds_both(tmp_path):
    written = python_text.write_documentation(tmp_path / "folder" / "python.txt").read_text()
    assert python_text.language_reference() in written
    assert python_text.docstrings() in written
