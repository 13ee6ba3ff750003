"""The page that explains the loss, in a headless browser: it computes as the package does, draws, and answers its controls."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from proac_cuda import prototype_certificate
from proac_cuda.reference import proac_loss

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "explained"
BROWSER = next((path for path in map(shutil.which, ("chromium", "google-chrome", "chromium-browser")) if path), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
]


def answer(folder: Path, url: str, *options: str) -> object:
    """What the page left, as JSON, in its element #answer."""
    command = [BROWSER, *QUIET, f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="answer"[^>]*>(.+?)</pre>', ran.stdout, re.DOTALL)
    assert found, ran.stdout[-2000:] + ran.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0])
def test_the_page_computes_what_the_reference_computes(temperature, tmp_path):
    """In float64, features of any length; class 4 of 5 has no pixels."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    prototypes = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (30,), generator=generator)
    rows = features.t()[None]  # (1, D, N), as a map with one spatial axis
    loss = proac_loss(rows, labels[None], prototypes, temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, features)
    arguments = json.dumps([features.tolist(), labels.tolist(), prototypes.tolist(), temperature])
    (tmp_path / "page.html").write_text(
        f'<pre id="answer"></pre><script src="{(PAGE / "proac.js").as_uri()}"></script><script>'
        f"const found = ProAC.loss(...{arguments});"
        'document.getElementById("answer").textContent = JSON.stringify([found.value, found.gradient]);</script>'
    )
    value, found = answer(tmp_path, (tmp_path / "page.html").as_uri())
    assert value == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), gradient, rtol=1e-10, atol=1e-13)


WATCH = '<script>const errors = []; addEventListener("error", (event) => errors.push(event.message));</script>'
TRY = """<pre id="answer" hidden></pre><script>
const at = (id) => document.getElementById(id);
const move = (id, value) => {
  at(id).value = value;
  for (const kind of ["input", "change"]) at(id).dispatchEvent(new Event(kind));
};
const shown = (id) => at(id).value;
const colours = (id) => {
  const canvas = at(id);
  const data = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return new Set(data).size;
};
const seen = {drawn: ["sphere", "set", "tile"].map(colours), before: shown("loss")};
seen.width = document.documentElement.scrollWidth - innerWidth;
for (let i = 0; i < 60; i++) at("step").click();
Object.assign(seen, {after: shown("loss"), own: shown("own")});
move("count", 1);
seen.smallSet = [shown("log-z-all"), shown("log-z-set"), shown("log-z-scaled")];
move("count", 60);
seen.wholeSet = [shown("log-z-all"), shown("log-z-set"), shown("log-z-scaled")];
for (let k = 3; k <= 12; k++) { move("classes", k); for (const a of [-1, 0, k - 1]) move("anchor", a); }
for (const t of [-3, 0]) move("temperature", t);
const read = [];
for (let t = 0; t < 30; t++) { move("time", t); read.push(parseInt(shown("read"))); }
Object.assign(seen, {read, classes: at("anchor").length - 1, loss: shown("loss"), errors});
at("answer").textContent = JSON.stringify(seen);
</script>"""


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1200])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_draws_and_answers(width, theme, tmp_path):
    folder = tmp_path / "page"
    shutil.copytree(PAGE, folder)
    text = (folder / "index.html").read_text()
    text = text.replace("<head>", "<head>" + WATCH, 1).replace("</body>", TRY + "</body>", 1)
    (folder / "index.html").write_text(text)
    url = f"{(folder / 'index.html').as_uri()}?theme={theme}"
    seen = answer(tmp_path, url, f"--window-size={width},1600")
    assert seen["errors"] == [] and seen["width"] <= 0, seen  # nothing to scroll sideways
    assert min(seen["drawn"]) > 10, seen
    assert float(seen["after"]) < 0.5 * float(seen["before"]) and float(seen["own"]) > 0.9, seen
    every, few, _ = map(float, seen["smallSet"])
    assert few < every
    assert len(set(seen["wholeSet"])) == 1, seen
    assert seen["classes"] == 12 and float(seen["loss"]) > 0
    assert seen["read"] == sorted(seen["read"]) and seen["read"][-1] == 100


@pytest.mark.slow
def test_prototypes_of_the_page_are_as_good_as_the_best_known():
    rows = re.findall(r"^  (\d+): (\[.*\]),$", (PAGE / "prototypes.js").read_text(), re.MULTILINE)
    assert [int(k) for k, _ in rows] == list(range(3, 13))
    for k, row in rows:
        prototypes = torch.tensor(json.loads(row), dtype=torch.float64)
        certificate = prototype_certificate(prototypes)
        assert prototypes.shape == (int(k), 3)
        assert certificate.largest_cosine <= certificate.best_known + 1e-5, (k, certificate)


def test_the_page_needs_no_network():
    for path in PAGE.iterdir():
        assert not re.search(r"https?://", path.read_text()), path
