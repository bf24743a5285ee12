"""Files that are there whole, or as they were before."""

import pytest

from monitor.replacing import ABANDONED, replacing


def test_what_fails_midway_leaves_what_was_there(tmp_path):
    path = tmp_path / "table.parquet"
    path.write_text("old")

    def half():
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        half()
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"]


def test_a_reader_of_tables_never_meets_half_a_file(tmp_path):
    path = tmp_path / "table.parquet"
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert list(tmp_path.glob("*.parquet")) == []
        assert list(tmp_path.glob(ABANDONED)) == [temporary]
    assert [each.name for each in tmp_path.iterdir()] == ["table.parquet"]
    assert path.read_text() == "half"
