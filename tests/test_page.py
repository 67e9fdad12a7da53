"""report.html, read as text and looked at in a real browser (Chromium, where one is installed)."""

import html
import json
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from PIL import Image

from evodiff import plots
from evodiff.config import compose
from evodiff.plots import Curve, foremost, save_curves
from evodiff.tables import published
from evodiff.tables.chart import chart
from evodiff.tables.table import Table

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr"]
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium was found; install one to look at the page")

PAPERS = """model,method,variant,nfe,metric,value,images,guidance,source,table,confidence
m,DDIM,<i>odd & name</i>,5,latent MSE,0.001,16,,A paper arXiv:1,Table 1,quoted
m,Trained,,5,latent MSE,0.001,16,,A paper arXiv:1,Table 1,quoted
"""


@pytest.fixture
def report(results, monkeypatch, tmp_path_factory):
    """The page of a small table with two runs in each cell, and one paper."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "smoke.csv").write_text(PAPERS)
    monkeypatch.setattr(published, "FOLDER", folder)
    published.read.cache_clear()
    cfg = compose("table", ["table=smoke"])
    cfg.table.rows = {
        "DDIM <b>": {"run": ["solver=ddim"], "published": [{"source": "A paper", "method": "DDIM"}]},
        "UniPC & co": ["solver=unipc_3"],
    }
    cfg.table.update({"published": "smoke", "metric": "latent MSE", "seeds": ["0-15", "16-31"], "nfe": [5, 8]})
    cfg.table.base = ["model=mixture", "protocol=none", "shard=16", "batch=16"]
    table = Table.from_config(cfg)
    assert table.make() == 0
    yield table.folder / "report.html"
    published.read.cache_clear()


def browse(page, tmp_path, *flags):
    """What Chromium printed (the DOM, with --dump-dom) and the lines of its console."""
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_the_page_renders_without_errors(report, tmp_path):
    dom, console = browse(report, tmp_path, "--dump-dom")
    dom = re.sub(r"(?s)<(script|noscript).*?</\1>", "", dom)
    assert console == []
    # three figures (mse, rmse, contrast), each with a line and two points for every row
    assert dom.count('<svg viewBox="0 0 960 430"') == 3
    assert dom.count('<polyline points="') == 6 and dom.count('<circle cx="') == 12
    assert dom.count('class="paper"') == 1  # the paper's point stands on the first figure only
    assert dom.count('class="band"') == 6  # two runs give a confidence interval
    assert dom.count("<img alt=") == 2  # samples and trajectories


@needs_browser
def test_the_switches_change_the_figure(report, tmp_path):
    page = report.with_name("switched.html")
    script = """<script>{
    const box = document.querySelector(".chart"), seen = {};
    const ticks = () => [...box.querySelectorAll("svg text")].map(t => t.textContent).join(" ");
    const set = (name, on) => { const i = box.querySelector(`input[name=${name}]`); if (i.checked !== on) i.click(); };
    seen.log = ticks(); set("logy", false); seen.linear = ticks();
    set("bands", false); seen.bands = box.querySelectorAll("polygon").length;
    set("papers", false); seen.papers = box.querySelectorAll("circle.paper").length;
    box.querySelector(".legend button").click(); seen.rows = box.querySelectorAll("g.row").length;
    document.title = JSON.stringify(seen);
    }</script></body>"""
    page.write_text(report.read_text().replace("</body>", script))
    dom, console = browse(page, tmp_path, "--dump-dom")
    seen = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom)[1]))
    assert console == []
    assert seen["log"] != seen["linear"] and seen["linear"].split()[0] == "0"
    assert (seen["bands"], seen["papers"], seen["rows"]) == (0, 0, 1)


@needs_browser
def test_the_figures_are_to_be_seen(report, tmp_path):
    shot = tmp_path / "page.png"
    browse(report, tmp_path, f"--screenshot={shot}", "--window-size=1200,900")
    picture = Image.open(shot).convert("RGB")
    colours = {colour for count, colour in picture.getcolors(1 << 24) if count > 20}
    assert {(0, 114, 178), (230, 159, 0)} <= colours  # the lines of the first two rows
    assert (255, 255, 255) in colours


def test_names_of_rows_are_whole_on_the_pictures(tmp_path):
    grey, kappas = np.zeros((9, 1, 8, 8), np.uint8), np.geomspace(80, 0.01, 8)
    name = "DPM-Solver++ 3M, order lowered at the end"
    plots.save_trajectories(tmp_path / "t.png", {name: (grey, kappas), "DDIM": (grey[:4], kappas[:3])}, "seed 0")
    plots.save_sample_sheet(tmp_path / "s.png", {name: {5: grey, 8: grey}})
    for picture in ("t.png", "s.png"):
        shown = np.asarray(Image.open(tmp_path / picture).convert("L"))
        assert (shown[:, :3] == 255).all() and (shown < 255).any()


def test_the_page_is_whole_in_itself(report):
    text = report.read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    assert not re.search(r"https?://(?!www\.w3\.org)", text.replace("arXiv:1", ""))
    for words in ("Protocol", "Trajectories", "Samples", "Published only", "evodiff run model=mixture", "torch "):
        assert words in text


def test_names_cannot_break_the_page(report):
    text = report.read_text()
    assert "DDIM <b>" not in text.replace('"name": "DDIM <b>"', "")
    assert "DDIM &lt;b&gt;" in text and "UniPC &amp; co" in text and "<i>odd" not in text


def test_data_cannot_end_its_script():
    block = chart({"</script><b>": Curve({5: 1.0}, {}, {})}, {}, "fid@5", "")
    assert block.count("</script>") == 1
    data = json.loads(re.search(r"json\">(.*?)</script>", block)[1])
    assert data["rows"][0]["name"] == "</script><b>" and data["rows"][0]["ours"] == [[5, 1.0, 0]]


@pytest.mark.parametrize(("nfes", "wide"), [([5, 25], False), ([10, 1000], True)])
def test_wide_ranges_of_nfe_start_logarithmic(nfes, wide):
    block = chart({"a": Curve(dict.fromkeys(nfes, 1.0), {}, {})}, {}, "fid", "")
    assert ('name="logx" checked' in block) == wide


def test_of_many_methods_those_that_lead_somewhere_are_named(tmp_path):
    curves = {f"m{i}": Curve({5: float(i + 1), 10: float(100 - i)}, {}, {}) for i in range(30)}
    assert foremost(dict([*curves.items()][:20])) == [f"m{i}" for i in range(20)]
    named = foremost(curves)
    assert named == ["m0", "m1", "m2", "m27", "m28", "m29"]
    save_curves([tmp_path / "f.svg"], curves, "rmse", named=named)
    told = re.findall(r"<!-- (m\d+|\d+ others) -->", (tmp_path / "f.svg").read_text())
    assert sorted(told) == sorted([*named, "24 others"])


def test_a_distance_of_0_ends_a_line(tmp_path):
    """That of a run from itself has no place on a logarithmic axis, and is no reason to draw as if it were near."""
    curves = {"a": Curve({5: 0.5, 9: 0.2, 79: 0.0}, {}, {}), "b": Curve({5: 0.4, 9: 0.3, 79: 0.1}, {}, {})}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_curves([tmp_path / "f.svg"], curves, "rmse", {"heun": 0.0})
    picture = (tmp_path / "f.svg").read_text()
    assert "<!-- b -->" in picture and "<!-- heun 0 -->" not in picture
    axis = [float(text) for text in re.findall(r"<!-- ([\d.]+) -->", picture)]
    assert min(axis) > 0.04


@pytest.mark.parametrize("values", [(0.0029, 0.0039), (31.0, 36.0), (0.5, 40.0)])
def test_the_vertical_axis_of_a_figure_has_numbers(values, tmp_path):
    save_curves([tmp_path / "f.svg"], {"a": Curve(dict(zip((3, 7), values, strict=True)), {}, {})}, "rmse")
    labels = [float(text) for text in re.findall(r"<!-- ([\d.]+) -->", (tmp_path / "f.svg").read_text())]
    assert sum(0.7 * values[0] <= label <= 1.4 * values[1] and label not in (3, 7) for label in labels) >= 2
