"""What `.ci/site.py` does to pages before MkDocs builds them, which CI does with warnings as errors."""

import importlib.util
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs the extra notebooks")

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("site_builder", ROOT / ".ci" / "site.py")
site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site)


@pytest.fixture
def linked(tmp_path):
    def linked(text: str, source: str = "README.md") -> str:
        return site.REPOSITORY_LINK.sub(lambda link: site.on_site(source, tmp_path, link), text)

    return linked


def test_links_lead_to_pages_or_become_text(linked):
    assert linked("[idea](notebooks/1-idea.py)") == "[idea](notebooks/1-idea.ipynb)"
    assert linked("[how](CONTRIBUTING.md#a-mask)") == "[how](CONTRIBUTING.md#a-mask)"
    assert linked("[`mass`](rr_flex/mass.py)") == "`mass`"
    kept = "[a](https://example.org/x) [b](#masks)"
    assert linked(kept) == kept


def test_a_room_s_links_are_relative_to_it(linked):
    assert linked("[start](../README.md)", "benchmarks/README.md") == "[start](../index.md)"
    assert linked("[kernels](kernels/README.md)", "rr_flex/README.md") == "[kernels](kernels/README.md)"
    assert linked("[rows](results/rows.md)", "benchmarks/README.md") == "rows"


def test_pictures_come_along(linked, tmp_path):
    shown = "![of one head](benchmarks/results/front-page.png)"
    assert linked(shown) == shown
    assert (tmp_path / "benchmarks" / "results" / "front-page.png").read_bytes().startswith(b"\x89PNG")


def test_a_dead_link_stops_the_build(linked):
    with pytest.raises(SystemExit, match=r"README\.md must link to files that exist, got missing\.md"):
        linked("[x](missing.md)")


def test_a_room_that_the_navigation_lacks_stops_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "ROOMS", {"Speed": "benchmarks/README.md", "Masks": "rr_flex/README.md"})
    with pytest.raises(SystemExit, match=r"must name every room's page, got none for .*rr_flex/kernels/README\.md"):
        site.gather(tmp_path, None)


def test_widgets_go_and_pictures_stay():
    notebook = jupytext.reads("# %%\n1", fmt="py:percent")
    widget, picture = (
        {"output_type": "display_data", "metadata": {}, "data": {kind: "x", "text/plain": "x"}}
        for kind in ("application/vnd.jupyter.widget-view+json", "image/png")
    )
    log = {"output_type": "stream", "name": "stderr", "text": "a warning of some library"}
    notebook.cells[0].outputs = [log, widget, picture]
    assert site.without_widgets(notebook).cells[0].outputs == [picture]


def test_every_page_notebook_and_reference_is_in_the_navigation(tmp_path):
    navigation = site.gather(tmp_path, None)
    pages = {page for entry in navigation for part in entry.values() for page in leaves(part)}
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert pages == {path for path in written if not path.endswith(".png")}
    assert {f"notebooks/{path.stem}.ipynb" for path in site.notebooks()} <= pages
    assert set(site.room_pages()) <= pages


def leaves(part) -> list[str]:
    return [part] if isinstance(part, str) else [page for entry in part for page in entry.values()]
