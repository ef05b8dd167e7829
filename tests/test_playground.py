"""The page at /: what its file says, and what it does in a real browser, before the real server and scripted ones."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import stars
from browser import Browser, Tab, chromium
from serving_http import Running, running_server, service_of_pair, wait_until
from stars.calibration import Calibration
from stars.cli.options import shipped_calibration, shipped_pair
from stars.serve.http.app import build_app
from stars.serve.http.page import playground_page
from stars.serve.http.service import Service
from stars.serve.http.settings import ServerSettings
from stars.trace import read_trace

SCREENSHOTS = "STARS_SCREENSHOTS"
"""The environment variable that names a directory for pictures of the page."""
PROMPT = "This film was"
FIELDS = {"prompt": PROMPT, "reward_threshold": 2.5, "beta": 0.2, "segment_size": 8, "max_tokens": 48, "seed": 3}
POLICY = stars.STARS(reward_threshold=2.5, beta=0.2, segment_size=8)
HOSTILE = '<img src=x onerror="window.hit = 1"><script>window.hit = 1</script>'
AA, AA_LARGE = 4.5, 3.0

needs_browser = pytest.mark.skipif(chromium() is None, reason="there is no chromium on this machine")


class Parsed(HTMLParser):
    """The elements of the page, in their order."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.texts[self._inside] = self.texts.get(self._inside, "") + data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in tags]


@pytest.fixture(scope="module")
def source() -> str:
    return playground_page().body.decode("utf8")


@pytest.fixture(scope="module")
def parsed(source) -> Parsed:
    return Parsed(source)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_of_anybody_else(source, parsed):
    addresses = re.findall(r"""(?:https?:|wss?:|(?<![:\w])//(?=[a-z]))[^\s"'`]*""", source)
    assert {address for address in addresses if "www.w3.org" not in address} == set()  # names of SVG's, never loaded
    linked = [attributes[name] for _, attributes in parsed.found for name in ("src", "href", "action", "srcset", "data")
              if attributes.get(name) is not None]
    assert [link[:24] for link in linked] == ["data:image/svg+xml,%3Csv"]
    assert "url(" not in parsed.texts["style"] and "@import" not in parsed.texts["style"]


def test_only_the_scripts_own_hash_lets_it_run(parsed):
    def source_of(name: str) -> str:
        digest = hashlib.sha256(parsed.texts[name].encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    policy = playground_page().headers["Content-Security-Policy"]
    directives = {name: sources for name, _, sources in (part.partition(" ") for part in policy.split("; "))}
    assert directives == {
        "default-src": "'none'", "script-src": source_of("script"), "style-src": source_of("style"),
        "img-src": "data:", "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'",
        "frame-ancestors": "'none'", "require-trusted-types-for": "'script'", "trusted-types": "'none'"}
    assert len(parsed.all("script")) == len(parsed.all("style")) == 1
    inline = [(tag, name) for tag, attributes in parsed.found for name in attributes
              if name == "style" or name.startswith("on")]
    assert inline == []


def test_no_text_becomes_html_and_nothing_is_kept(parsed):
    script = parsed.texts["script"]
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "createContextualFragment", "eval(",
                 "new Function", "DOMParser", "localStorage", "sessionStorage", "indexedDB", "document.cookie",
                 "serviceWorker"):
        assert word not in script, word


def test_everything_has_one_name(parsed):
    ids = [attributes["id"] for _, attributes in parsed.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = {attributes.get("for") for attributes in parsed.all("label")}
    assert labels - {None} <= set(ids)
    for attributes in parsed.all("input", "textarea", "select"):
        within = attributes["id"] == "keep"  # a checkbox stands in its label
        assert attributes["id"] in labels or "aria-label" in attributes or within, attributes
    for _, attributes in parsed.found:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert set((attributes.get(name) or "").split()) <= set(ids), attributes
    assert parsed.found[0] == ("html", {"lang": "en"})
    for landmark in ("header", "main", "footer", "h1"):
        assert len(parsed.all(landmark)) == 1
    regions = parsed.all("section", "form")
    assert len(regions) == 5 and all("aria-labelledby" in one or "aria-label" in one for one in regions)
    assert [one for _, one in parsed.found if one.get("aria-live") == "polite" and one.get("role") == "status"]
    assert [one["id"] for _, one in parsed.found if one.get("role") == "alert"] == ["error"]


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(parsed, scheme):
    blocks = re.findall(r":root \{(.*?)\}", parsed.texts["style"], re.DOTALL)
    assert len(blocks) == 2
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[scheme]))
    texts = {"ink": ("page", "card", "sunk", "tint"), "soft": ("page", "card", "sunk"), "on-accent": ("accent",),
             "bad": ("card", "bad-tint"), "accent": ("card",)}
    for text, grounds in texts.items():
        for ground in grounds:
            assert contrast(colors[text], colors[ground]) >= AA, (text, ground)
    for edge in ("edge", "accent", "soft", "bad"):  # borders of fields, marks, focus
        for ground in ("page", "card"):
            assert contrast(colors[edge], colors[ground]) >= AA_LARGE, (edge, ground)


# -- the server -------------------------------------------------------------------------------------------------------


def settings(**others: Any) -> ServerSettings:
    return ServerSettings("film-reviews", calibration=Calibration.load(str(shipped_calibration())), **others)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with service_of_pair(settings(policy_parameters={"beta": "auto"}), cache_tokens=8192) as service:
        yield service


def client_of(service: Service, settings: ServerSettings | None = None) -> TestClient:
    return TestClient(build_app(service if settings is None else Service(service.engine, settings)))


def test_it_is_sent_whole_once(service, source):
    client = client_of(service)
    first = client.get("/")
    assert first.status_code == 200 and first.text == source
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    assert first.headers["cache-control"] == "no-cache" and first.headers["x-content-type-options"] == "nosniff"
    tag = first.headers["etag"]
    for known in (tag, f'W/{tag}, "other"', "*"):
        again = client.get("/", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head("/")
    assert head.content == b"" and head.headers["content-length"] == str(len(source.encode()))
    assert client.post("/").status_code == 405


def test_it_can_be_left_out(service):
    client = client_of(service, settings(page=False))
    assert client.get("/").status_code == client.get("/v1/playground").status_code == 404
    assert client.get("/health").status_code == 200


def test_what_the_page_must_know(service):
    found = client_of(service).get("/v1/playground").json()
    calibration = service.settings.calibration
    assert found["defaults"] == {"reward_threshold": float(calibration), "beta": calibration.beta, "segment_size": 16,
                                 "width": None}
    assert (found["model"], found["chat"], found["reward"]) == ("film-reviews", False, True)
    assert found["threshold_range"] == [-5.0, 4.0]  # a unit beyond what was seen

    bare = client_of(service, ServerSettings("film-reviews", policy_parameters={"segment_size": 4})).get(
        "/v1/playground").json()
    assert bare["defaults"] == {"reward_threshold": None, "beta": 0.7, "segment_size": 4, "width": None}
    assert bare["threshold_range"] == [-5.0, 5.0]
    other = client_of(service, ServerSettings("film-reviews", policy="cards", policy_parameters={
        "reward_threshold": 1.0, "beta": 0.1})).get("/v1/playground").json()  # what is said of CARDS is not of STARS
    assert other["defaults"] == {"reward_threshold": None, "beta": 0.7, "segment_size": 16, "width": None}


def test_what_the_page_must_know_needs_a_key_where_there_is_one(service):
    client = client_of(service, settings(api_keys=["secret"]))
    assert client.get("/").status_code == 200
    assert client.get("/v1/playground").status_code == 401
    assert client.get("/v1/playground", headers={"Authorization": "Bearer secret"}).json()["model"] == "film-reviews"


# -- the browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(service) -> Iterator[Running]:
    with running_server(service) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def tab(browser, server, request) -> Iterator[Tab]:
    """The page, which knows its server; in the end the browser has complained of nothing, and asked nobody else."""
    tab = browser.tab()
    tab.media()
    tab.open(server.url)
    tab.until("about !== null", "the page did not learn what is served")
    yield tab
    mark = request.node.get_closest_marker("complains")
    assert tab.complaints(but=mark.args[0] if mark else None) == []
    assert [url for url in tab.requested() if not url.startswith((server.url, "data:", "blob:"))] == []
    assert tab.js("[localStorage.length, sessionStorage.length, document.cookie, window.hit ?? 0]") == [0, 0, "", 0]
    tab.close()


def fill(tab: Tab, **fields: Any) -> None:
    for name, value in {**FIELDS, **fields}.items():
        tab.fill(name, value)


def run(tab: Tab) -> None:
    """Both sides, to the end."""
    tab.js("run()")
    assert tab.text("#error") == ""


def timed(tab: Tab) -> float:
    """Seconds of a run, until all is played."""
    return tab.js("(async () => { const begin = performance.now(); await run(); return performance.now() - begin; })()"
                  ) / 1e3


def written(tab: Tab, side: str) -> str:
    return tab.js(f"[...document.querySelectorAll('#{side} .seg')].map(part => part.textContent).join('')")


def dots(tab: Tab) -> dict[str, int]:
    kinds = tab.js("new Promise(requestAnimationFrame).then(() => "  # in which the latest are drawn
                   "[...document.querySelectorAll('#chart .dot')].map(dot => dot.classList[1]))")
    return {kind: kinds.count(kind) for kind in kinds}


def shoot(tab: Tab, name: str, whole: bool = False) -> None:
    if os.environ.get(SCREENSHOTS):
        tab.screenshot(Path(os.environ[SCREENSHOTS]) / f"{name}.png", whole)


@needs_browser
def test_both_sides_stream_what_the_engine_writes(tab, server, tmp_path):
    tab.save_files_to(tmp_path)
    fill(tab)
    tab.js("$('run').click()")
    tab.until("document.querySelector('#aligned del:not(.past)')", "no rejected candidate was shown")
    shoot(tab, "running")
    tab.until("running === null", "the run did not end")
    assert tab.text("#error") == "" and tab.text("#status").startswith("Done. Reward ")

    params = stars.SamplingParams(temperature=0.8, max_tokens=48, seed=3)
    for side, policy in (("plain", stars.Sample(score=True)), ("aligned", POLICY)):
        [output] = server.engine.generate(PROMPT, params, policy, use_tqdm=False)
        completion = output.outputs[0]
        assert written(tab, side) == completion.text
        assert tab.text(f"#{side} .prompt") == PROMPT
        shown = f"{completion.reward:+.2f}".replace("-", "−")
        assert tab.text(f"#{side}-facts") == f"reward {shown} · 48 tokens · ended by length"

    tab.js("$('save').click()")
    wait_until(lambda: (tmp_path / "stars-trace.jsonl").exists())
    plain, aligned = read_trace(tmp_path / "stars-trace.jsonl")
    assert (plain.policy["name"], aligned.policy["name"]) == ("Sample", "STARS")
    [completion] = aligned.completions
    statuses = [segment.status(attempt) for segment in completion.segments for attempt in segment.attempts
                if attempt.reward is not None]
    assert statuses.count("rejected") > 5
    assert dots(tab) == {kind: statuses.count(kind) for kind in dict.fromkeys(statuses)}
    rejected = [attempt.text for segment in completion.segments for attempt in segment.attempts
                if segment.status(attempt) == "rejected"]
    struck = tab.js("[...document.querySelectorAll('#aligned del')].map(gone => [...gone.childNodes].map(part => "
                    "part.className === 'sr' || part.className === 'reward' ? '' : part.textContent).join(''))")
    assert struck == rejected
    assert tab.js("document.querySelectorAll('#rows tr').length") == sum(
        len(segment.attempts) for segment in completion.segments)
    figures = tab.js("Object.fromEntries([...$('figures').rows].map(row => [row.cells[0].textContent, "
                     "row.cells[2].textContent]))")
    assert figures["accept rate"] == f"{round(100 * completion.metrics['accept_rate'])} %"
    assert figures["attempts"] == str(completion.metrics["attempts"])
    assert figures["width"] == str(completion.metrics["width"]) and figures["tokens"] == "48"
    assert dots(tab)  # drawn
    assert f"{completion.metrics['attempts_counted']} candidates, " in tab.text("#chart-words")


@needs_browser
def test_rejected_candidates_fade_unless_they_are_to_stay(tab):
    fill(tab)
    run(tab)
    count = "[...document.querySelectorAll('#aligned del')].filter(gone => gone.getClientRects().length).length"
    tab.until(f"{count} === 0", "rejected candidates do not fade", 5)
    tab.js("$('keep').click()")
    assert tab.js(count) == tab.js("document.querySelectorAll('#aligned del').length") > 5
    assert "(rejected, reward " in tab.text("#aligned del")
    shoot(tab, "kept")


@needs_browser
def test_a_threshold_is_measured(tab, server):
    fill(tab, max_tokens=16)
    tab.js("$('measure').click()")
    tab.until("running === null", "nothing was measured")
    assert tab.text("#error") == ""
    params = stars.SamplingParams(temperature=0.8, max_tokens=16, seed=3)
    found = server.engine.calibrate([PROMPT], params, 0.9, 16, segment_size=8)
    assert float(tab.js("$('reward_threshold').value")) == pytest.approx(found, rel=1e-3)
    assert float(tab.js("$('beta').value")) == pytest.approx(found.beta, rel=1e-3)
    assert f"Threshold {found:+.2f}: the 0.9 quantile" in tab.text("#status").replace("−", "-")
    tab.js("about.defaults.reward_threshold = null; $('reward_threshold').value = ''")
    run(tab)  # of a server that knows none, it is measured before
    assert float(tab.js("$('reward_threshold').value")) == pytest.approx(found, rel=1e-3)


@needs_browser
@pytest.mark.filterwarnings("ignore:reward_threshold=100 accepted 0")
def test_escape_stops_and_the_pages_are_free(tab, server):
    fill(tab, reward_threshold=100, beta=0, segment_size=1, max_tokens=400)
    tab.js("void run()")
    tab.until("document.querySelector('#aligned .seg')", "nothing came")
    assert server.held > 0
    tab.press("Escape")
    tab.until("running === null", "the run goes on")
    wait_until(lambda: server.held == 0)
    assert tab.text("#status") == "Stopped." and tab.text("#error") == ""
    assert tab.js("$('stop').getAttribute('aria-disabled')") == "true"
    assert 0 < len(written(tab, "aligned"))
    fill(tab, max_tokens=8)  # and the page can go on
    run(tab)
    assert "8 tokens" in tab.text("#aligned-facts")


@needs_browser
def test_the_keyboard_is_enough(tab):
    fill(tab, max_tokens=8)
    seen: list[str] = []
    while True:
        tab.press("Tab")
        name = tab.js("""(() => {
            const here = document.activeElement;
            if (here === document.body) return "";
            const ring = getComputedStyle(here.id === "open" ? here.nextElementSibling : here);
            if (!here.matches(":focus-visible") || ring.outlineStyle === "none" || parseFloat(ring.outlineWidth) < 2)
                return `no ring: ${here.outerHTML}`;
            return here.id || here.closest("details").id;
        })()""")
        if name == "" or name in seen:
            break
        assert not name.startswith("no ring"), name
        seen.append(name)
        assert len(seen) < 60, "Tab is trapped"
    sliders = [part for name in ("reward_threshold", "beta", "segment_size", "width")
               for part in (name, f"{name}-slider")]
    assert seen == ["open", "save", "prompt", "run", "stop", "settings", *sliders, "measure", "max_tokens",
                    "temperature", "seed", "key", "keep", "numbers", "code"]

    tab.js("$('segment_size-slider').focus()")
    tab.press("ArrowRight")
    assert tab.js("$('segment_size').value") == "9"
    tab.js("$('width-slider').focus()")
    tab.press("ArrowRight")
    assert tab.js("[$('width').value, $('width-slider').getAttribute('aria-valuetext')]") == ["1", "1"]
    tab.press("ArrowLeft")
    assert tab.js("[$('width').value, $('width-slider').getAttribute('aria-valuetext')]") == [
        "", "chosen by the server"]
    tab.js("$('prompt').focus(); $('prompt').value = ''")
    tab.type("The plot")
    tab.press("Enter", ctrl=True)
    tab.until("running === null && aligned.tokens === 8", "Ctrl Enter did not run")
    assert tab.text("#plain .prompt") == "The plot"
    tab.js("$('numbers').querySelector('summary').focus()")
    tab.press("Enter")
    assert tab.js("$('numbers').open")


AUDIT = """(() => {
  const parts = color => [...color.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const over = (top, ground) => [0, 1, 2].map(i => top[i] * top[3] + ground[i] * (1 - top[3]));
  const light = color => color.map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const bad = [];
  let looked = 0;
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!(own || one.placeholder || one.value) || !one.getClientRects().length) continue;
    if (one.closest("script, style, noscript, .sr, option, [type=range], [type=checkbox], [type=file]")) continue;
    const style = getComputedStyle(one);
    const grounds = [];
    for (let up = one; up; up = up.parentElement) grounds.unshift(parts(getComputedStyle(up).backgroundColor));
    const ground = grounds.reduce((below, top) => over(top, below), [255, 255, 255]);
    const text = over(parts(one instanceof SVGElement ? style.fill : style.color), ground);
    const [low, high] = [light(text), light(ground)].sort((a, b) => a - b);
    const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
    looked += 1;
    const contrast = (high + .05) / (low + .05);
    if (contrast < (large ? 3 : 4.5)) bad.push([one.outerHTML.slice(0, 90), contrast]);
  }
  return [looked, bad];
})()"""


@needs_browser
@pytest.mark.parametrize("scheme, background", [("light", "rgb(246, 246, 244)"), ("dark", "rgb(20, 22, 26)")])
def test_every_text_can_be_read(tab, scheme, background):
    tab.media(scheme, "reduce")
    fill(tab, max_tokens=32)
    run(tab)
    tab.js("$('keep').click(); $('numbers').open = $('code').open = true")
    tab.js("complain(new Failure('What it looks like.', 'beta'))")
    assert tab.js("getComputedStyle(document.body).backgroundColor") == background
    looked, bad = tab.js(AUDIT)
    assert looked > 100 and bad == []
    shoot(tab, f"{scheme}-whole", True)
    tab.js("calm(); $('keep').click(); $('numbers').open = $('code').open = false")
    shoot(tab, scheme)


@needs_browser
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_is_cut_off(tab, width):
    tab.resize(width, 800)
    tab.media("light", "reduce")
    fill(tab, max_tokens=32)
    run(tab)
    tab.js("$('settings').open = $('keep').checked = $('numbers').open = $('code').open = true")
    tab.js("$('keep').dispatchEvent(new Event('change'))")
    assert tab.js("document.documentElement.scrollWidth") == width
    beyond = """[...document.querySelectorAll("body *")].filter(one => one.getClientRects().length
        && !one.closest(".sr, .scroll, pre, svg") && one.getBoundingClientRect().right > innerWidth)
        .map(one => one.outerHTML)"""
    assert tab.js(beyond) == []
    shoot(tab, f"width-{width}", True)


# -- scripted servers -------------------------------------------------------------------------------------------------

SCRIPT = """
window.fetch = async (path, options) => {
  const plan = %s[path.split("/").at(-1)] ?? null;
  window.asked = [...window.asked ?? [], path];
  if (!plan) throw new TypeError("Failed to fetch");
  const { status, headers, chunks, cut } = plan;
  return new Response(new ReadableStream({ async start(to) {
    try {
      for (const chunk of chunks) to.enqueue(Uint8Array.from(atob(chunk), c => c.charCodeAt(0)));
      if (cut) to.error(new TypeError("network error")); else to.close();
    } catch {}
  } }), { status, headers });
};
"""


def script(tab: Tab, pieces: Sequence[bytes | str] = (), status: int = 200, headers: dict[str, str] | None = None,
           cut: bool = False, down: bool = False) -> None:
    """From now on completions are answered so."""
    chunks = [base64.b64encode(piece if isinstance(piece, bytes) else piece.encode()).decode() for piece in pieces]
    plan = {"status": status, "headers": headers or {}, "chunks": chunks, "cut": cut}
    tab.js(SCRIPT % json.dumps({} if down else {"completions": plan}))


def data(value: Any) -> str:
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"


def segment(text: str, rejected: int = 0) -> dict[str, Any]:
    attempt = {"text": text, "reward": 2.0, "threshold": 1.0, "accept_probability": 1.0, "accepted": True,
               "logprob": -1.0, "token_ids": [5] * 4}
    lost = {**attempt, "text": f"not {text}", "reward": -1.0, "accept_probability": 0.0, "accepted": False}
    return {"text": text, "reward": 2.0, "threshold": 1.0, "accepted": True, "winner": rejected, "token_ids": [5] * 4,
            "attempts": [lost] * rejected + [attempt]}


def streamed(*segments: dict[str, Any], finish: str | None = "stop") -> dict[str, Any]:
    found = {"segments": list(segments), "reward": 2.0, "accept_rate": 0.5, "attempts": 2, "width": 1,
             "finish_reason": finish}
    return {"choices": [{"index": 0, "text": "".join(one["text"] for one in segments), "finish_reason": finish,
                         "stars": found}]}


END = data({"choices": [], "usage": {"completion_tokens": 4}, "stars": {"trace": ""}}) + data("[DONE]")


@needs_browser
def test_events_are_read_however_they_are_cut(tab):
    text = ('\ufeffdata: {"a": "naïve 東京 🙂"}\r\n\r\n: a comment\ndata:two\ndata:  lines\n\nevent: x\nid: 7\ndata\n'
            "\n\ndata: one\r\ndata: event\r\n\r\ndata: cr\r\rdata: [DONE]\n\ndata: no end")
    expected = ['{"a": "naïve 東京 🙂"}', "two\n lines", "", "one\nevent", "cr", "[DONE]", "no end"]
    cuts = """(bytes => {
        const wrong = [];
        const read = pieces => {
            const parser = new EventParser();
            return [...pieces.flatMap(piece => parser.feed(piece)), ...parser.end()];
        };
        const single = read([...bytes].map(byte => Uint8Array.of(byte)));
        for (let i = 0; i <= bytes.length; i++) for (let j = i; j <= bytes.length; j += 3) {
            const found = read([bytes.slice(0, i), bytes.slice(i, j), bytes.slice(j)]);
            if (JSON.stringify(found) !== JSON.stringify(single)) wrong.push([i, j, found]);
        }
        return [single, wrong];
    })(Uint8Array.from(%s))"""
    assert tab.js(cuts % list(text.encode())) == [expected, []]


@needs_browser
def test_a_stream_cut_within_characters_is_whole(tab):
    body = (data(streamed(segment("naïve 東京 🙂", 1), segment(" Größe"), finish=None)) + data(streamed(segment("!")))
            + END).encode()
    fill(tab)
    script(tab, [body[at : at + 7] for at in range(0, len(body), 7)])
    run(tab)
    assert written(tab, "plain") == written(tab, "aligned") == "naïve 東京 🙂 Größe!"
    parts = "[...document.querySelectorAll('#aligned .seg')].map(part => part.textContent)"
    assert tab.js(parts) == ["naïve 東京 🙂", " Größe", "!"]


@needs_browser
def test_playing_keeps_up_with_the_stream(tab):
    fill(tab)
    script(tab, [*(data(streamed(segment(f" {index}", 10), finish=None)) for index in range(60)), END])
    seconds = timed(tab)
    assert written(tab, "aligned") == "".join(f" {index}" for index in range(60))
    assert tab.js("document.querySelectorAll('#aligned del').length") == 600 == dots(tab)["rejected"]
    assert seconds < 8.0  # 660 steps: 1.2 s, MAX_LAG, and what a busy machine takes; at their usual pace 211 s
    script(tab, [data(streamed(segment(" slow", 2))), END])
    seconds = timed(tab)
    assert seconds > 0.5  # two candidates are in sight for a while


@needs_browser
def test_nothing_moves_where_motion_is_unwanted(tab):
    tab.media("light", "reduce")
    fill(tab)
    script(tab, [data(streamed(segment(" a", 3), finish=None)), data(streamed(segment(" b", 3))), END])
    tab.js("window.moved = 0; document.addEventListener('animationstart', () => { window.moved += 1; })")
    assert any(timed(tab) < 1.1 for _ in range(3))  # or such as MAX_LAG, each time; a busy machine stands still once
    assert tab.js("[window.moved, document.getAnimations().length]") == [0, 0]
    assert written(tab, "aligned") == " a b"
    assert tab.js("[...document.querySelectorAll('#aligned del')].every(gone => gone.classList.contains('gone'))")
    assert tab.js("document.querySelector('#aligned .seg .words').dataset.rejected") == "3"


@needs_browser
@pytest.mark.complains("TrustedHTML")
def test_texts_of_models_and_users_stay_texts(tab):
    hostile = segment(f" {HOSTILE}", 1)
    fill(tab, prompt=HOSTILE)
    script(tab, [data(streamed(hostile)), END])
    run(tab)
    assert written(tab, "aligned") == f" {HOSTILE}" and HOSTILE in tab.text("#aligned del")
    assert tab.text("#plain .prompt") == HOSTILE
    script(tab, [refusal(HOSTILE, HOSTILE)], status=400)
    tab.js("run()")
    assert tab.text("#error") == f"{HOSTILE}."
    assert HOSTILE.replace('"', '\\"') in tab.text("#python")
    assert tab.js("[document.images.length, document.scripts.length, window.hit ?? 0]") == [0, 1, 0]
    tried = "(() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } })()"
    assert tab.js(tried) == "TypeError"  # the browser itself refuses


def refusal(message: str, param: str | None = None) -> str:
    return json.dumps({"error": {"message": message, "type": "x", "param": param, "code": None}})


ERRORS: list[tuple[dict[str, Any], str, str | None]] = [
    (dict(pieces=[refusal("beta is -1, it must be 0 or above", "stars.beta")], status=400),
     "beta is -1, it must be 0 or above.", "beta"),
    (dict(pieces=[refusal("the prompt is too long", "messages.0.content")], status=400), "the prompt is too long.",
     "prompt"),
    (dict(pieces=[refusal("max_tokens is too many", "max_completion_tokens")], status=400), "max_tokens is too many.",
     "max_tokens"),
    (dict(pieces=[refusal("an API key is needed")], status=401), "an API key is needed.", "key"),
    (dict(pieces=[refusal("256 requests wait")], status=429, headers={"Retry-After": "7"}),
     "256 requests wait; try again in 7 s.", None),
    (dict(pieces=[refusal("the server is shutting down")], status=503, headers={"Retry-After": "1"}),
     "the server is shutting down; try again in 1 s.", None),
    (dict(pieces=["<html>Bad gateway"], status=502), "the server answered with status 502.", None),
    (dict(pieces=[data(streamed(segment(" a"), finish=None)), data({"error": {"message": "the engine failed"}})]),
     "the engine failed.", None),
    (dict(pieces=[data(streamed(segment(" a"), finish=None))]), "answer broke off before its end.", None),
    (dict(pieces=[data(streamed(segment(" a"), finish=None))], cut=True), "the connection or the server is gone.",
     None),
    (dict(pieces=["data: {broken\n\n"]), "the connection or the server is gone.", None),
    (dict(pieces=[], down=True), "The server cannot be reached: look whether it is still running.", None),
]
"""How completions are answered, the end of what is shown, and the field that is at fault."""


@needs_browser
def test_errors_are_one_sentence_and_name_the_field(tab):
    fill(tab)
    for answer, shown, field in ERRORS:
        script(tab, **answer)
        tab.js("run()")
        assert tab.text("#error").endswith(shown)
        assert tab.js("[...document.querySelectorAll('[aria-invalid]')].map(one => one.id)") == [field][: bool(field)]
        assert not field or tab.js("document.activeElement.id") == field
        assert tab.text("#status") == "It did not finish."
    script(tab, [data(streamed(segment(" again"))), END])
    run(tab)  # what was wrong is forgotten
    assert tab.js("document.querySelectorAll('[aria-invalid]').length") == 0 and written(tab, "aligned") == " again"


@needs_browser
def test_what_cannot_be_sent_is_said_here(tab):
    fill(tab, beta=-1)
    tab.js("run()")
    assert tab.text("#error").startswith("Beta is not valid: ") and tab.js("document.activeElement.id") == "beta"
    fill(tab, prompt="")
    tab.js("run()")
    assert tab.text("#error") == "The prompt is empty: write something."
    assert "/v1/completions" not in str(tab.requested())


@needs_browser
@pytest.mark.complains("status of 400")
@pytest.mark.parametrize("field, value", [("temperature", 1e300), ("seed", 1e30)])
def test_what_the_server_refuses_is_shown(tab, server, field, value):
    fill(tab, **{field: value})
    tab.js("run()")
    assert field in tab.text("#error") and tab.js(f"$('{field}').getAttribute('aria-invalid')") == "true"
    wait_until(lambda: server.held == 0)


@needs_browser
def test_a_key_is_sent_and_kept_nowhere(browser, service):
    with running_server(Service(service.engine, settings(api_keys=["a-secret"]))) as server:
        tab = browser.tab()
        tab.open(server.url)
        tab.until("document.getElementById('error').textContent", "the missing key was not noticed")
        assert tab.js("[$('key').getAttribute('aria-invalid'), document.activeElement.id]") == ["true", "key"]
        tab.fill("key", "a-secret")
        tab.until("about !== null", "the key was not tried")
        fill(tab, max_tokens=8)
        run(tab)
        assert "8 tokens" in tab.text("#aligned-facts")
        assert "$STARS_API_KEY" in tab.text("#curl") and 'os.environ["STARS_API_KEY"]' in tab.text("#python")
        assert "a-secret" not in tab.js("document.documentElement.outerHTML")
        assert tab.js("[localStorage.length, sessionStorage.length, document.cookie, location.href]") == [
            0, 0, "", f"{server.url}/"]
        tab.close()


# -- traces and code --------------------------------------------------------------------------------------------------


@needs_browser
def test_a_trace_is_replayed_without_a_server(tab, server, tmp_path):
    params = stars.SamplingParams(temperature=0.8, max_tokens=24, seed=5)
    runs = [server.engine.generate(prompt, params, policy, use_tqdm=False)[0]
            for prompt in (HOSTILE, PROMPT) for policy in (stars.Sample(score=True), POLICY)]
    stars.write_trace(tmp_path / "trace.jsonl", runs, server.engine.tokenizer, params)
    script(tab, down=True)
    tab.choose_file("open", tmp_path / "trace.jsonl")
    tab.until("$('stop').textContent === 'Skip'", "the trace was not opened")
    tab.press("Escape")
    tab.until("$('status').textContent.startsWith('The trace was replayed')", "the trace was not replayed")
    assert tab.text("#error") == ""
    assert (written(tab, "plain"), written(tab, "aligned")) == tuple(run.outputs[0].text for run in runs[:2])
    assert tab.text("#aligned .prompt") == HOSTILE

    tab.js("$('pick').value = '3'; $('pick').dispatchEvent(new Event('change'))")
    tab.until("$('status').textContent === 'The trace was replayed: 3 segments.'", "it was not replayed by itself", 20)
    assert written(tab, "aligned") == runs[3].outputs[0].text and tab.text("#plain .prompt") == PROMPT
    scored = [attempt for one in runs[3].outputs[0].segments for attempt in one.attempts if attempt.reward is not None]
    tab.until(lambda: sum(dots(tab).values()) == len(scored), "the chart, drawn with the next frame, has other dots")
    assert tab.js("window.asked ?? []") == []


HEAD = '{"type": "trace", "format": "stars-trace", "version": 1}\n'
NO_TRACES = {
    "no json\n": "Line 1 of the file is not JSON", '{"type": "other"}\n': "The file is no trace",
    HEAD.replace("1", "9"): "version 9", HEAD: "holds no answer", HEAD + '{"type": "attempt"}\n': "is damaged"}


@needs_browser
def test_what_is_no_trace_is_refused(tab, tmp_path):
    for text, shown in NO_TRACES.items():
        (tmp_path / "file.jsonl").write_text(text)
        tab.js("calm()")
        tab.choose_file("open", tmp_path / "file.jsonl")
        tab.until("$('error').textContent", "nothing was said")
        assert shown in tab.text("#error")


@needs_browser
def test_the_code_does_the_same(tab, server):
    fill(tab, prompt="This film's \"plot\"\nwas ü", max_tokens=16)
    run(tab)
    text = written(tab, "aligned")
    if shutil.which("curl"):
        told = subprocess.run(["bash", "-c", tab.text("#curl")], capture_output=True, timeout=60, check=True)
        assert json.loads(told.stdout)["choices"][0]["text"] == text
    pytest.importorskip("openai")
    told = subprocess.run([sys.executable, "-c", tab.text("#python")], capture_output=True, timeout=120, check=True)
    assert told.stdout.decode().startswith(f"{text}\n") and "accept_rate" in told.stdout.decode()


# -- other servers ----------------------------------------------------------------------------------------------------


@needs_browser
def test_a_chat_model_gets_messages(browser, copied):
    lm, reward = map(copied, shipped_pair())
    for directory in (lm, reward):
        (directory / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    chat = ServerSettings("chat", policy_parameters={"reward_threshold": 0.0})
    with service_of_pair(chat, model=lm, reward=reward, cache_tokens=1024) as service, \
            running_server(service) as server:
        tab = browser.tab()
        tab.open(server.url)
        tab.until("about !== null", "the page did not learn what is served")
        assert tab.text("#prompt-label") == "Message"
        fill(tab, prompt="How are you?", max_tokens=12, reward_threshold=0, segment_size=4)
        run(tab)
        messages = {"messages": [{"role": "user", "content": "How are you?"}]}
        for side, policy in (("plain", stars.Sample(score=True)),
                             ("aligned", stars.STARS(reward_threshold=0.0, beta=0.2, segment_size=4))):
            params = stars.SamplingParams(temperature=0.8, max_tokens=12, seed=3)
            [output] = server.engine.generate([messages], params, policy, use_tqdm=False)
            assert written(tab, side) == output.outputs[0].text
        assert tab.js("document.querySelectorAll('.prompt').length") == 0
        assert "chat.completions.create" in tab.text("#python") and "/v1/chat/completions" in tab.text("#curl")
        assert tab.complaints() == []
        tab.close()


@needs_browser
def test_without_a_reward_there_is_one_side(browser):
    with service_of_pair(ServerSettings("plain"), reward=None, cache_tokens=512) as service, \
            running_server(service) as server:
        tab = browser.tab()
        tab.open(server.url)
        tab.until("about !== null", "the page did not learn what is served")
        tab.fill("max_tokens", 8)
        run(tab)
        assert "no reward model" in tab.text("#status") and "tokens" in tab.text("#plain-facts")
        assert written(tab, "aligned") == ""
        assert tab.complaints() == []
        tab.close()
