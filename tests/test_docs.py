"""The documentation: what is made is up to date, every example runs, every link leads somewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import warnings
from pathlib import Path

import pytest

import stars
from serving_http import chat_pair, running_server, service_of_pair
from stars.cli import main as stars_command
from stars.serve.http.settings import ServerSettings
from tiny_models import TinyModel, write_model

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAIR = Path(stars.__file__).parent / "demo_models"
PAGES = [*sorted(path.name for path in DOCS.glob("*.md")), "../README.md"]
NAMED = {"path/to/lm": "lm", "path/to/rm": "rm", "lm": "lm", "rm": "rm", "lm-dpo": "guide", "lm-1b": "small",
         "agent.safetensors": "agent/model.safetensors"}
"""What the paths of examples are, of what ships."""
ADDRESS, ANOTHER = "http://127.0.0.1:8000", "http://127.0.0.1:8001"
ASKING = ("http.md", "openai.md", "vllm_client.md")
"""Pages whose examples ask a server."""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each block of a page."""
    return BLOCK.findall((DOCS / page).read_text(encoding="utf8"))


@pytest.fixture()
def models(tmp_path, monkeypatch):
    """A working directory in which the models of the examples are."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name, shipped in NAMED.items():
        (tmp_path / name).symlink_to(PAIR / shipped)
    write_model(tmp_path / "path" / "to" / "chat-model", TinyModel(tokenizer=True, chat_template=True))
    monkeypatch.chdir(tmp_path)


@pytest.fixture()
def address(page, tmp_path):
    """Of a server, where the examples of a page ask one."""
    if page not in ASKING:
        yield ADDRESS
        return
    pytest.importorskip("openai")
    settings = ServerSettings("NAME") if page == "http.md" else ServerSettings("NAME", policy="sample")
    with service_of_pair(settings, **chat_pair(tmp_path / "chat")) as service:
        with running_server(service) as server:
            yield server.url


@pytest.mark.parametrize("page", [page for page in PAGES if page != "api.md"])
def test_the_examples_of_a_page_run(page, models, address, capsys):
    """In order and in one namespace, as a reader would type them."""
    names: dict = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few attempts accepted, which some examples show
        for index, (language, text) in enumerate(blocks(page)):
            if language == "python":
                text = text.replace(ADDRESS, address).replace(ANOTHER, address)
                exec(compile(text, f"{page}, example {index}", "exec"), names)  # noqa: S102
            for line in text.splitlines() if not language else ():
                if line.startswith("stars "):
                    assert stars_command(shlex.split(line)[1:]) in (None, 0), line
    capsys.readouterr()


def test_the_pages_have_examples():
    assert sum(language == "python" for page in PAGES for language, _ in blocks(page)) >= 20


def test_what_is_made_is_up_to_date():
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    stale = [path.name for path, text in build.pages().items() if path.read_text(encoding="utf8") != text]
    assert not stale, "run `make docs`"


def test_every_export_has_a_docstring_in_the_reference():
    text = (DOCS / "api.md").read_text(encoding="utf8")
    for name in stars.__all__:
        entry = re.search(rf"^### `stars\.{name}`\n(.*?)(?=^###? |\Z)", text, re.MULTILINE | re.DOTALL)
        assert entry is not None and re.search(r"^\w", BLOCK.sub("", entry[1]), re.MULTILINE), name


def test_fields_are_those_of_the_class_and_not_lines_of_its_docstring():
    text = (DOCS / "api.md").read_text(encoding="utf8")
    for name in stars.__all__:
        value = getattr(stars, name)
        if dataclasses.is_dataclass(value):
            [body] = re.findall(rf"^class {name}:\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
            listed = re.findall(r"^    (\w+): ", body, re.MULTILINE)
            assert listed == [field.name for field in dataclasses.fields(value)], name


def test_all_python_is_marked_so_and_runs():
    for page in PAGES[:-1]:
        for language, text in blocks(page):
            if not language and page != "api.md":
                assert not re.search(r"^(import|from|engine =|with|async def) ", text, re.MULTILINE), (page, text)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (DOCS / page).read_text(encoding="utf8")
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        path = (DOCS / page).parent / file if file else DOCS / page
        assert path.exists(), target
        if anchor:
            headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                        for line in path.read_text(encoding="utf8").splitlines() if line.startswith("#")}
            assert anchor in headings, target


def test_figures_that_pages_quote_are_there():
    for page in PAGES:
        for name in re.findall(r"`(benchmarks/[\w./-]+)`", (DOCS / page).read_text(encoding="utf8")):
            assert (ROOT / name.split()[0]).exists(), name
