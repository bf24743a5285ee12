"""The files of the live page: whole JavaScript of a bounded size that asks nobody but the service,
and whose modules can be put into one file.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import playwright
import pytest

from monitor.service import pages

NODE = Path(playwright.__file__).parent / "driver" / "node"
MODULES = {
    name: path.read_text()
    for name, path in pages.files().items()
    if name.endswith(".js") and not name.startswith("vendor/")
}
IMPORT = re.compile(r'^import \{[^}]*\} from "\./([a-z]+\.js)";$', re.MULTILINE)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_whole_and_short(name, tmp_path):
    assert MODULES[name].startswith("// ")
    assert MODULES[name].count("\n") < 400
    # As a module, whatever the folder says.
    copy = tmp_path / name.replace(".js", ".mjs")
    copy.write_text(MODULES[name])
    done = subprocess.run([NODE, "--check", copy], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_import_each_other_simply_and_only_what_there_is():
    seen, todo = set(), ["main.js"]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            imported = IMPORT.findall(MODULES[name])
            assert len(imported) == len(re.findall(r"^import\b", MODULES[name], re.MULTILINE))
            assert "await import(" not in MODULES[name]
            todo += imported
    assert seen == {*MODULES}


def test_what_is_imported_is_exported():
    for name, text in MODULES.items():
        for names, other in re.findall(
            r'^import \{ ([^}]*) \} from "\./(.*)";$', text, re.MULTILINE
        ):
            for each in names.split(", "):
                assert re.search(
                    rf"^export (async )?(function|class|const) {each}\b",
                    MODULES[other],
                    re.MULTILINE,
                ), f"{name} imports {each} of {other}"
                assert len(re.findall(rf"\b{each}\b", text)) > 1, f"{name} does not use {each}"


@pytest.mark.parametrize("name", MODULES)
def test_only_data_asks_and_nothing_makes_markup_of_text(name):
    if name != "data.js":
        assert not re.search(r"\bfetch\(|EventSource|XMLHttpRequest", MODULES[name])
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", MODULES[name]
    )


def test_the_page_names_nothing_from_elsewhere():
    for name, path in pages.files().items():
        for address in re.findall(r"https?://[^\s\"')]+", path.read_text()):
            # The name of the language SVG, and where uPlot is from, in a comment.
            assert address in ("http://www.w3.org/2000/svg", "https://github.com/leeoniya/uPlot"), (
                name
            )
