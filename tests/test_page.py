"""report.html, read as text, its figures drawn by Node, and looked at in a real browser, where these are installed."""

import html
import json
import re
import shlex
import shutil
import subprocess
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evodiff import plots
from evodiff.config import compose
from evodiff.plots import Curve, foremost, save_curves
from evodiff.runs.job import Job
from evodiff.runs.record import Record
from evodiff.runs.score import score_files
from evodiff.tables import html as report_page
from evodiff.tables import published
from evodiff.tables.chart import CHART_JS, OF_IMAGES, SWITCHES, chart
from evodiff.tables.table import Table

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr"]
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium was found; install one to look at the page")
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="no Node was found; install it to draw figures without a browser")

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


PAGE_OF_ONE_CHART = """
const element = () => ({
  children: [], innerHTML: "", attributes: {}, classList: {toggle() {}}, querySelectorAll: () => [],
  append(child) { this.children.push(child); }, setAttribute(key, value) { this.attributes[key] = value; },
});
const figure = element(), legend = element(), inputs = INPUTS;
const box = {
  querySelector: path => path === "script" ? {textContent: DATA} : path === "figure" ? figure :
    path === ".legend" ? legend : inputs[path.match(/name=(\\w+)/)[1]] ?? null,
  querySelectorAll: () => Object.values(inputs),
};
const document = {querySelectorAll: () => [box], createElement: element};
SCRIPT
const button = name => legend.children.find(b => b.innerHTML.endsWith(name));
const click = name => button(name).onclick(), twice = name => { click(name); click(name); button(name).ondblclick(); };
const set = (name, on) => { inputs[name].checked = on; inputs[name].onchange(); };
const seen = [], look = () => seen.push({
  figure: figure.innerHTML, legend: legend.children.map(b => b.innerHTML),
  pressed: legend.children.map(b => b.attributes["aria-pressed"]),
});
look();
for (const action of ACTIONS) { eval(action); look(); }
console.log(JSON.stringify(seen));
"""
"""What chart.js asks of a page, around one block of it."""


def drawn(block, *actions):
    """What a figure and its legend show at first, and after each action."""
    data = re.search(r"(?s)json\">(.*?)</script>", block)[1]
    inputs = {name: {"checked": bool(on)} for name, on in re.findall(r'name="(\w+)"( checked)?', block)}
    words = {"DATA": data, "INPUTS": inputs, "ACTIONS": actions}
    script = re.sub("|".join(words), lambda found: json.dumps(words[found[0]]), PAGE_OF_ONE_CHART)
    done = subprocess.run(
        [NODE, "-"], input=script.replace("SCRIPT", CHART_JS), capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


def rows_of(seen):
    return re.findall('data-name="([^"]*)"', seen["figure"])


@needs_node
def test_a_row_is_isolated_and_the_others_come_back():
    block = chart({name: Curve({5: 1.0, 9: 2.0}, {}, {}) for name in "abc"}, {}, "fid", "")
    at_first, without_a, alone, again = drawn(block, "click('a')", "twice('b')", "twice('b')")
    assert (rows_of(at_first), at_first["pressed"]) == ([*"abc"], ["true"] * 3)
    assert (rows_of(without_a), without_a["pressed"]) == ([*"bc"], ["false", "true", "true"])
    assert (rows_of(alone), rows_of(again)) == ([*"b"], [*"abc"])
    assert again["pressed"] == ["true"] * 3


@needs_node
def test_sixty_rows_look_different_and_the_legend_shows_how():
    block = chart({f"m{i:02}": Curve({5: 1.0, 9: 2.0}, {}, {}) for i in range(60)}, {}, "fid", "")
    (seen,) = drawn(block)
    look = re.compile('stroke="(#\\w+)" stroke-dasharray="([\\d ]*)"')
    lines = [look.search(line).groups() for line in re.findall("<polyline.*?>", seen["figure"])]
    assert len({*lines}) == 60
    assert [look.search(sample).groups() for sample in seen["legend"]] == lines


@needs_node
@pytest.mark.parametrize("logarithmic", ["true", "false"])
def test_bands_stay_in_the_figure(logarithmic):
    curve = Curve({5: 1.0, 9: 2.0}, {5: 0.9, 9: 40.0}, {})
    *_, seen = drawn(chart({"a": curve}, {}, "fid", ""), f"set('logy', {logarithmic})")
    x, y, width, height = (
        float(number) for number in re.search("<clipPath.*?<rect (.*?)/>", seen["figure"])[1].split('"')[1::2]
    )
    clip = re.search('<clipPath id="(.*?)"', seen["figure"])[1]
    (band,) = re.findall(f'<g clip-path="url\\(#{clip}\\)"><polygon class="band" points="(.*?)"', seen["figure"])
    points = np.array(band.split(), float).reshape(-1, 2)
    assert (points >= (x, y)).all() and (points <= (x + width, y + height)).all()
    assert np.ptp(points[:, 1]) > 0.8 * height  # and they are what the range is made for


def words_of(seen, axis):
    """The numbers along an axis, and the words besides."""
    anchor = {"y": "end", "x": "middle"}[axis]
    return re.findall(f'<text x="[^"]*" y="[^"]*" text-anchor="{anchor}">(.*?)</text>', seen["figure"])


@needs_node
@pytest.mark.parametrize(("value", "least"), [(1.0, "0"), (-1.0, "-1")])
def test_a_linear_axis_begins_at_0_or_the_least_value(value, least):
    block = chart({"a": Curve({5: value, 8: 2.0}, {5: 3.0, 8: 3.0}, {})}, {}, "fid", "")
    *_, seen = drawn(block, "set('logy', false)")
    assert words_of(seen, "y")[0] == least


@needs_node
def test_no_budget_is_broken():
    (seen,) = drawn(chart({"a": Curve({5: 1.0, 8: 2.0}, {}, {})}, {}, "fid", ""))
    assert words_of(seen, "x") == ["5", "6", "7", "8", "NFE"]


@needs_node
@pytest.mark.parametrize(("near", "anchor"), [(25, "start"), (5, "end")])
def test_a_level_is_named_on_top_of_the_curves_where_none_is(near, anchor):
    around = {name: Curve({5: 9.0, 25: 9.0} | {near: value}, {}, {}) for name, value in (("a", 2.1), ("b", 1.9))}
    (seen,) = drawn(chart(around, {"converged": 2.0}, "fid", ""))
    name = f'text-anchor="{anchor}" paint-order="stroke" stroke="#fff" stroke-width="4">converged: 2</text>'
    assert name in seen["figure"][seen["figure"].rindex("<circle") :]


@needs_node
def test_of_many_rows_the_foremost_are_shown_at_first():
    curves = {f"m{i:02}": Curve({5: float(i + 1), 10: float(100 - i)}, {}, {}) for i in range(30)}
    named = foremost(curves)
    first, one_more = drawn(chart(curves, {}, "fid", "", named), "click('m15')")
    assert rows_of(first) == named and len(first["legend"]) == 30
    assert rows_of(one_more) == sorted([*named, "m15"])
    (elsewhere,) = drawn(chart({"m15": curves["m15"]}, {}, "fid", "", named))
    assert rows_of(elsewhere) == ["m15"]  # a metric without any of them shows what it has


def test_confidence_is_named_for_what_it_is_from():
    curves = {"a": Curve({5: 1.0}, {5: 0.1}, {})}
    assert "95 % confidence, between runs</label>" in chart(curves, {}, "fid", "")
    assert "±1.96 standard errors, from one run's images</label>" in chart(curves, {}, "fid", "", one_set=True)
    assert "95 %" not in chart({"a": Curve({5: 1.0}, {}, {})}, {}, "fid", "")


@pytest.mark.parametrize(("sets", "told"), [(["0-99"], OF_IMAGES), (["0-99", "100-199"], SWITCHES["bands"])])
def test_a_page_tells_what_its_confidence_is_from(sets, told, small):
    table = small(
        {"DDIM": ["solver=ddim"]},
        seeds=sets,
        nfe=[5],
        base=[
            "model=mixture_digits",
            "protocol=mnist",
            "reference_run=null",
            "metrics=[fid,ci]",
            "shard=100",
            "batch=100",
        ],
    )
    assert table.make() == 0
    page = (table.folder / "report.html").read_text()
    assert f'name="bands" checked> {told}</label>' in page


def facts_of(table):
    """The protocol as (name, value), as a reader sees them."""
    block = re.search("(?s)<h2>Protocol</h2>(.*?)</table>", report_page.page(table))[1]
    found = re.findall("<tr><th scope=row>(.*?)</th><td><code>(.*?)</code></td></tr>", block)
    return [(name, html.unescape(value)) for name, value in found]


def test_the_protocol_is_that_of_every_cell(results):
    told = facts_of(Table.of_file("celeba64"))
    values = [value for name, value in told if name == "t_start"]
    assert values[0].startswith("0.901, of DDPM at NFE 10; DDIM at NFE 10;") and values[-1] == "None, of all others"
    assert [value.partition(",")[0] for name, value in told if name == "denoise_final"] == ["True", "False"]
    assert not {"compile", "t_end"} & dict(told).keys()  # as everywhere
    networks = [value for name, value in facts_of(Table.of_file("cifar10_edm_nvlabs")) if name == "model"]
    assert {value.partition(" ")[0] for value in networks} == {
        f"cifar10_edm{x}" for x in ("", "_ve", "_cond", "_cond_ve")
    }
    assert ("precision", "fp16") in facts_of(Table.of_file("imagenet64_edm"))


def test_the_protocol_names_the_runs_that_distances_are_to(results):
    table = Table.of_file("sd_mse", ["repeats=1"])
    told = facts_of(table)
    scales = [value for name, value in told if name == "guidance"]
    assert len(scales) == 2 and "scale=7.5), of EVODiff, scale 7.5;" in scales[0] and "scale=1.5" in scales[1]
    words = [shlex.split(command) for name, command in told if name == "reference run"]
    assert {tuple(command[:2]) for command in words} == {("evodiff", "run")}
    assert [Job.compose(overrides).run.key() for _, _, *overrides in words] == [*table.references]
    assert len(words) == 2


def test_the_protocol_has_the_files_of_all_records(small):
    table = small()
    table.make()
    paths = [next(iter(score_files(job))) for job in table.jobs.values()]
    for digest, path in zip(("aa", "bb"), paths, strict=False):
        replace(Record.read(path), weights={"network": digest}).write(path)
    assert [value for name, value in facts_of(small()) if name == "sha256 of network"] == ["aa", "bb"]


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
