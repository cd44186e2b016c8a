"""What `.ci/site.py` does to pages before MkDocs builds them, which CI does with warnings as errors."""

import importlib.util
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs the extra notebooks")

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("site_builder", ROOT / ".ci" / "site.py")
site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site)


def linked(text: str) -> str:
    return site.REPOSITORY_LINK.sub(lambda link: site.on_site("README.md", link), text)


def test_links_lead_to_pages_or_become_text():
    assert linked("[idea](notebooks/1-idea.py)") == "[idea](1-idea.ipynb)"
    assert linked("[how](CONTRIBUTING.md#adding-a-mask)") == "[how](CONTRIBUTING.md#adding-a-mask)"
    assert linked("[`mass`](rr_flex/mass.py)") == "`mass`"
    kept = "[a](https://example.org/x) [b](#masks)"
    assert linked(kept) == kept


def test_a_dead_link_stops_the_build():
    with pytest.raises(SystemExit, match=r"README\.md must link to files that exist, got missing\.md"):
        linked("[x](missing.md)")


def test_widgets_go_and_pictures_stay():
    notebook = jupytext.reads("# %%\n1", fmt="py:percent")
    widget, picture = (
        {"output_type": "display_data", "metadata": {}, "data": {kind: "x", "text/plain": "x"}}
        for kind in ("application/vnd.jupyter.widget-view+json", "image/png")
    )
    log = {"output_type": "stream", "name": "stderr", "text": "a warning of some library"}
    notebook.cells[0].outputs = [log, widget, picture]
    assert site.without_widgets(notebook).cells[0].outputs == [picture]


def test_every_notebook_and_reference_is_in_the_navigation(tmp_path):
    navigation = site.gather(tmp_path, None)
    pages = {page for entry in navigation for part in entry.values() for page in leaves(part)}
    assert pages == {path.name for path in tmp_path.iterdir()}
    assert {f"{path.stem}.ipynb" for path in site.notebooks()} <= pages


def leaves(part) -> list[str]:
    return [part] if isinstance(part, str) else [page for entry in part for page in entry.values()]
