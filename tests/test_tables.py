"""The tables of papers: every cell is a run that can be made, no run is in two cells, every number has its place."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

import evodiff.config
from evodiff.checkpoints.description import stated_schedule
from evodiff.checkpoints.registry import registry
from evodiff.config import build, choices, compose
from evodiff.errors import ConfigError
from evodiff.models.loading import scaled_linear_betas, schedule_of
from evodiff.models.pretrained import Pretrained
from evodiff.paths import CONFIGS
from evodiff.runs.record import Record
from evodiff.schedule import EDM, DiscreteVP
from evodiff.tables.table import Table

PAPERS = [n for n in choices("table") if n not in ("demo", "smoke") and not n.startswith("mnist")]
LDM = DiscreteVP.from_betas(scaled_linear_betas(0.0015, 0.0195, 1000))


@pytest.fixture(scope="module")
def tables():
    return {name: Table.of_file(name) for name in choices("table")}


def without_files(run):
    """The same run without what must be computed first: a grid from a file, a model's statistics."""
    solver = {k: v for k, v in run.solver.items() if k != "statistics"}
    grid = {"_target_": "evodiff.grid.Karras"} if run.grid["name"] == "file" else run.grid
    return replace(run, solver=solver, grid=grid)


def unloaded(run):
    """What a plan needs of a model: its schedule and the shape of its states, without weights."""
    model = run.model
    if "pipeline" in model:
        schedule = LDM
    elif model.get("schedule") not in (None, "own"):
        schedule = build(model["schedule"])
    else:
        entry = registry().get(model.get("checkpoint"))
        stated = entry and (
            entry.schedule or (entry.config and stated_schedule(entry.architecture, entry.config, None))
        )
        schedule = schedule_of(stated) if stated else EDM()
    shape = (1, 32, 32) if model["name"] in ("mnist_tiny", "mixture_digits") else (3, 64, 64)
    return Pretrained(lambda labels: SimpleNamespace(schedule=schedule), shape=shape)


LONG = ("mnist_oracle", "mnist_solvers", "mnist_solvers_1k", "mnist_seeds")
"""Tables of all solvers, for which composing hundreds of runs takes long."""
each_table = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in choices("table")]
)


@each_table
def test_every_cell_is_a_run_that_spends_its_budget(tables, name):
    for cell in tables[name].cells.values():
        run = without_files(cell.jobs[0].run)
        solver, grid = run.plan(unloaded(run))
        assert solver.evaluations(len(grid)) + run.denoise_final == cell.nfe, cell.label


@each_table
def test_every_run_of_a_table_is_another(tables, name):
    table = tables[name]
    assert len(set(table.keys.values())) == len(table.jobs) > 0


@pytest.mark.parametrize("names", [PAPERS, pytest.param(choices("table"), marks=pytest.mark.slow)])
def test_no_run_is_in_two_cells(tables, names):
    """But for EVODiff as released in the tables of its parts, the first seeds of the table of seeds, and the main
    solvers in the table of all."""
    places = {}
    again = ("mnist_solvers", "mnist_parts", "mnist_oracle_parts", "mnist_seeds")
    for table in (tables[name] for name in names if name not in again):
        for (row, nfe, k), job in table.jobs.items():
            key = f"{job.run.model['name']}/{table.keys[row, nfe, k]}"
            place = (table.config, row, nfe, k)
            # the digits of `demo` are those of `mnist`, on fewer seeds
            assert places.setdefault(key, place) == place


@pytest.mark.slow
def test_a_table_of_seeds_has_the_cells_of_the_tables_of_one_set(tables):
    """They begin with the same seeds, so that the runs are the same."""
    whole = {job.run.key() for name in ("mnist", "mnist_solvers") for job in tables[name].jobs.values()}
    seeds = tables["mnist_seeds"]
    assert {job.run.key() for (_, _, k), job in seeds.jobs.items() if k == 0} <= whole
    assert len(seeds.seeds) == 3


@pytest.mark.parametrize("name", PAPERS)
def test_every_paper_table_has_its_protocol_its_seeds_and_both_orders(tables, name):
    table = tables[name]
    job = next(iter(table.jobs.values()))
    assert len(table.seeds) == 3
    seeds = [seed for span in table.seeds for seed in (span.start, span.stop - 1)]
    assert seeds == sorted(set(seeds))  # no image is in two runs of a cell
    assert not table.is_proxy(table.images)
    if job.protocol is not None:
        assert job.protocol.n == table.images
    solvers = [(c.jobs[0].run.solver["_target_"], c.jobs[0].run.solver.get("order")) for c in table.cells.values()]
    for method in ("evodiff.solvers.dpmpp.DPMSolverPP", "evodiff.solvers.unipc.UniPC"):
        assert {(method, 2), (method, 3)} <= set(solvers)
    assert any("EVODiff" in row for row in table.rows)


@pytest.mark.parametrize("name", PAPERS)
def test_every_number_is_in_a_cell_or_listed_alone(tables, name):
    table = tables[name]
    in_cells = {paper for cell in table.cells.values() for paper in cell.papers}
    assert in_cells
    assert len(in_cells) + len(set(table.papers_only)) == len(set(table.papers))


def value(table, row, nfe):
    paper = table.cells[row, nfe].papers[0]
    return paper.number, paper.confidence


def test_known_claims_stand_beside_their_cells(tables):
    assert value(tables["cifar10_edm"], "EVODiff", 10) == (2.78, "secondary-note")
    assert value(tables["cifar10_edm"], "UniPC-3 bh1", 8) == (3.86, "quoted")
    assert value(tables["cifar10_edm_nvlabs"], "EDM Heun", 35) == (1.97, "secondary-note")
    assert value(tables["cifar10_edm_nvlabs"], "iPNDM-4", 10) == (2.77, "read-from-figure")
    assert value(tables["cifar10_ddpm"], "SciRE-V1-3", 84) == (3.15, "quoted")
    assert value(tables["cifar10_ddpm"], "DDPM", 1000) == (3.17, "quoted")
    assert value(tables["cifar10_ddpm"], "F-PNDM", 19) == (7.03, "quoted")  # ten steps, as its paper counts
    assert value(tables["cifar10_score_sde"], "DPM-Solver-v3", 10) == (3.40, "quoted")
    cells = [tables["cifar10_score_sde"].cells["DPM-Solver 3S", nfe] for nfe in (10, 12)]
    of_1e_4 = [[p.number for p in cell.papers if p.variant == "eps=1e-4"] for cell in cells]
    assert of_1e_4 == [[], [4.93]]  # up to 10 evaluations this row ends at 1e-3
    assert value(tables["imagenet256_adm"], "DPM-Solver++ 2M", 20) == (7.48, "quoted")
    assert value(tables["imagenet64_edm"], "EDM stochastic", 511) == (1.36, "quoted")
    assert value(tables["lsun_bedroom"], "UniPC-3", 5) == (12.24, "quoted")
    assert value(tables["sd_mse"], "UniPC-2, scale 1.5", 20) == (0.002, "quoted")
    assert value(tables["celeba64"], "DDIM", 1000) == (3.51, "quoted")
    assert value(tables["ffhq64_edm"], "EDM Heun", 79) == (2.39, "secondary-note")


def test_a_metric_of_fewer_images_is_not_the_papers(tables, tmp_path, monkeypatch):
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path))
    table, place = tables["cifar10_edm"], ("EVODiff", 10)
    job = table.cells[place].jobs[0]
    record = Record(
        **{"key": job.run.key(), "run": job.run.as_dict(), "protocol": job.protocol.describe(), "images": 50_000},
        **{"metrics": {"fid@5000": 7.0, "fid@50000": 2.8, "is@50000": 9.9}, "asked": [*job.metrics, "curve", "is"]},
        **{"nfe": 10, "network_passes": 10, "seconds": 1.0, "weights": {}, "shards": {}, "reference_run": None},
        device="cpu",
    )
    record.write(job.run.folder / "score.json")
    assert table.metrics == ["fid@50000", "is@50000"]  # what the table asks for
    table = replace(table, base=[*table.base, "metrics=[fid,curve,is]"])
    assert table.metrics == ["fid@50000", "fid@5000", "is@50000"]
    whole, part = (table.verdicts(metric)[place] for metric in ("fid@50000", "fid@5000"))
    assert (whole.paper.value, whole.images, whole.state) == ("2.78", 50_000, "ok")
    assert (part.paper, part.images, part.state) == (None, 5_000, "proxy")
    assert [table.stem(metric) for metric in table.metrics] == ["fid_vs_nfe", "fid_5000_vs_nfe", "is_vs_nfe"]


def test_settings_that_depend_on_the_budget_are_those_of_the_scripts(tables):
    def v3(nfe):
        run = tables["cifar10_score_sde"].cells["DPM-Solver-v3", nfe].jobs[0].run
        wanted = ("p_pseudo", "lower_order_final", "use_corrector")
        return (run.t_end, *(run.solver[k] for k in wanted), run.solver["statistics"]["folder"][-4:])

    assert v3(5) == (None, True, False, True, "1e-3")
    assert v3(8) == (None, False, True, True, "1e-3")
    assert v3(10) == (None, False, True, False, "1e-3")
    assert v3(12) == (1e-4, False, True, True, "1e-4")
    heun = tables["cifar10_edm"].cells
    assert [heun["EDM Heun", n].jobs[0].run.denoise_final for n in (5, 6, 15, 20)] == [True, False, True, False]


def test_the_deis_grid_runs_over_the_noise_levels_of_edm(tables):
    run = tables["cifar10_edm_nvlabs"].cells["DEIS-tAB3", 10].jobs[0].run
    schedule = build(run.model["schedule"])
    kappas = [schedule.node(t).kappa for t in (schedule.t_start, schedule.t_end)]
    assert kappas == pytest.approx([80, 0.002])


def test_ddims_last_call_is_at_the_first_label(tables):
    """CelebA, 10 evaluations: labels 900, 800, ..., 0, which are t = 0.901, ..., 0.001."""
    run = tables["celeba64"].cells["DDIM", 10].jobs[0].run
    _, grid = run.plan(unloaded(run))
    assert [node.t for node in grid.nodes] == pytest.approx([0.901 - 0.1 * i for i in range(10)])
    assert run.denoise_final and run.model["whole_labels"]


def table_with(rows, *overrides, **changes):
    cfg = compose("table", ["table=smoke", *overrides])
    cfg.table.rows = rows
    cfg.table.update(changes)
    return Table.from_config(cfg)


def test_later_overrides_are_stronger():
    rows = {"a": {"run": ["solver=ddim", "t_end=0.02"], "at": [{"nfe": [5], "run": ["t_end=0.03"]}], "nfe": [4, 5]}}
    cells = table_with(rows, at=[{"above": 3, "run": ["t_end=0.01", "t_start=70"]}]).cells
    assert [(cells["a", n].jobs[0].run.t_start, cells["a", n].jobs[0].run.t_end) for n in (4, 5)] == [
        (70, 0.02),
        (70, 0.03),
    ]


def test_a_limit_takes_the_first_images_of_each_range_and_makes_proxies():
    table = Table.of_file("celeba64", ["limit=64", "repeats=2"])
    assert {job.run.seeds for job in table.jobs.values()} == {(0, 63), (50_000, 50_063)}
    assert table.is_proxy(64) and table.name == "celeba64-64-repeats2"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": {"run": ["solver=ddim"], "nfes": [5]}}, "nfes is no key"),
        ({"a": {"run": ["solver=ddim"], "at": [{"run": []}]}}, "expected nfe"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused(rows, message):
    with pytest.raises(ConfigError, match=message):
        table_with(rows)


@pytest.mark.parametrize("key", ["title", "base", "rows", "nfe"])
def test_a_table_without_a_key_it_needs_is_refused(key):
    cfg = compose("table", ["table=smoke"])
    del cfg.table[key]
    with pytest.raises(ConfigError, match=f"table smoke lacks {key}: "):
        Table.from_config(cfg)


@pytest.fixture
def table_file(tmp_path, monkeypatch):
    """Writes a file beside those in configs/table; returns its name."""
    configs = tmp_path / "configs"
    shutil.copytree(CONFIGS, configs)
    monkeypatch.setattr(evodiff.config, "CONFIGS", configs)

    def write(content):
        path = configs / "table" / f"own{len(list(configs.glob('table/own*')))}.yaml"  # for compose keeps what it read
        path.write_text(content)
        return path.stem

    yield write
    evodiff.config._compose.cache_clear()


OWN = "title: a\nbase: [model=mixture, protocol=none]\nrows: {DDIM: [solver=ddim]}\nnfe: 5\n"


@pytest.mark.parametrize("limit", ["limit=null", "limit=4"])
def test_a_copied_table_that_keeps_its_old_name_is_refused(table_file, limit):
    name = table_file("name: smoke\n" + OWN)
    with pytest.raises(ConfigError, match=rf"configs/table/{name}.yaml says name: smoke.* write name: {name}"):
        Table.of_file(name, [limit])


def test_the_name_of_a_table_stays():
    with pytest.raises(ConfigError, match=r"table\.name cannot be changed: a table has the name of its file"):
        Table.of_file("smoke", ["table.name=x"])


def test_a_table_needs_no_name_but_its_files_and_one_number_is_enough(table_file):
    name = table_file(OWN)
    table = Table.of_file(name)
    assert (table.config, table.nfe) == (name, [5])
    named = table_file(f"name: own1\n{OWN}")
    assert Table.of_file(named, ["limit=4"]).name == "own1-4"
    assert Table.of_file(table_file(OWN.replace("[solver=ddim]}", "{run: [solver=ddim], nfe: 6}}"))).nfe == [6]
    at = table_file(OWN.replace("[solver=ddim]}", "{run: [solver=ddim], at: [{nfe: 5, run: [solver.eta=1]}]}}"))
    assert Table.of_file(at).jobs["DDIM", 5, 0].run.solver["eta"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"{name} lacks title, base, rows, nfe"),
        (OWN.replace("{DDIM: [solver=ddim]}", "[solver=ddim]"), "has no rows"),
        (OWN.replace("{DDIM: [solver=ddim]}", "{}"), "has no rows"),
        (OWN.replace("nfe: 5", "nfe: []"), "or no nfe"),
        (OWN.replace("[solver=ddim]}", "solver=ddim}"), "row DDIM: expected a list of overrides"),
        (OWN.replace("[solver=ddim]}", "{nfe: 5}}"), "row DDIM: expected a list of overrides"),
        ("title: a\nbase: [model=mixture\nnfe: [5]\n", r"cannot be read: .*/table/{name}.yaml\", line 3"),
    ],
)
def test_a_table_file_that_cannot_be_read_is_one_line(table_file, content, message):
    name = table_file(content)
    with pytest.raises(ConfigError, match=message.format(name=name)) as refused:
        Table.of_file(name)
    assert "\n" not in str(refused.value)


def with_row(field):
    return OWN.replace("[solver=ddim]", f"{{run: [solver=ddim], {field}}}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (OWN.replace("[model=mixture, protocol=none]", "model=mixture"), "table {name}: base: expected a list like"),
        (OWN + "seeds: 0-31\n", "table {name}: seeds: expected a list like .*, not '0-31'"),
        (OWN + "at: {nfe: [5], run: [t_end=0.01]}\n", "table {name}: at: expected a list like"),
        (OWN + "at: [{nfe: 5, run: t_end=0.01}]\n", "table {name}: at: run: expected a list like"),
        (OWN + "at: [{above: few, run: [t_end=0.01]}]\n", r"at: expected nfe \(a list\) or above \(a number\)"),
        (OWN + "published: {source: EDM}\n", "table {name}: published: expected the name of a file"),
        (OWN.replace("nfe: 5", "nfe: 5-8"), "table {name}: nfe: expected a list like"),
        (with_row("at: {nfe: 5}"), "row DDIM: at: expected a list like"),
        (with_row("published: {source: EDM}"), "row DDIM: published: expected a list like"),
        (with_row("published: [EDM]"), "row DDIM: published: expected a list like"),
        (OWN.replace("title: a", "title: 2024"), "table {name}: 2024 is no text: put it in quotes"),
        (OWN.replace("DDIM:", "5:"), "table {name}: 5 is no text: put it in quotes"),
        (OWN.replace("DDIM:", "on:"), "table {name}: True is no text: put it in quotes"),
        (OWN + "metric: FID\n", "table {name}: published and metric go together"),
        (OWN + "published: cifar10_edm\n", "table {name}: published and metric go together"),
        (OWN.replace("solver=ddim", "solver=ddim, nfe=9"), "row DDIM: nfe=9 has no effect: budgets are those of nfe"),
        (OWN.replace("protocol=none", "nfe=9"), "table {name}: base: nfe=9 has no effect: budgets are those of nfe"),
        (OWN + "at: [{nfe: [5], run: [nfe=9]}]\n", "row DDIM: nfe=9 has no effect: budgets are those of nfe"),
    ],
)
def test_what_is_no_list_is_told_with_an_example(table_file, content, message):
    name = table_file(content)
    with pytest.raises(ConfigError, match=message.format(name=name)):
        Table.of_file(name).cells  # noqa: B018


def test_impossible_limits_and_metrics_are_refused():
    for word in ("limit", "repeats"):
        with pytest.raises(ConfigError, match=f"{word}=True is impossible"):
            table_with({"A": ["solver=ddim"]}, f"{word}=true")
    with pytest.raises(ConfigError, match="limit=0 is impossible"):
        table_with({}, "limit=0")
    with pytest.raises(ConfigError, match="metric=FIDs is not known"):
        table_with({"A": ["solver=ddim"]}, metric="FIDs")
    with pytest.raises(ConfigError, match="repeats=2 is impossible: the table has 1 range of seeds"):
        table_with({"A": ["solver=ddim"]}, "repeats=2")
    with pytest.raises(ConfigError, match="seeds 0-9 and 5-14 overlap: an image would count twice"):
        table_with({"A": ["solver=ddim"]}, seeds=["5-14", "0-9"])
    with pytest.raises(ConfigError, match=r"One with a comma needs quotes: \"rows=\['NAME'\]\""):
        table_with({"A, as released": ["solver=ddim"]}, "rows=[A, as released]")


def test_a_limit_that_limits_nothing_makes_no_proxy(results):
    table = table_with({"A": ["solver=ddim"]}, "limit=5000", base=["model=mixture", "protocol=none", "seeds=0-15"])
    assert table.images == 16 and not table.is_proxy(16)
    whole = table_with({"A": ["solver=ddim"]}, "limit=16", base=["model=mixture", "protocol=none", "seeds=0-15"])
    assert not whole.is_proxy(16) and whole.name == table.name == "smoke"
    part = table_with({"A": ["solver=ddim"]}, "limit=15", base=["model=mixture", "protocol=none", "seeds=0-15"])
    assert part.is_proxy(15) and part.name == "smoke-15"
    assert table_with({"A": ["solver=ddim"]}, "limit=8", seeds=["0-7", "8-17"]).limit == 8
