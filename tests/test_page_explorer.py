"""The page of single nodes: its levels are Boolean matrices, and in a real browser its numbers are those of `snp`."""

from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
from test_browser import watched

from paperlib import optimum, page_explorer, snp, taps
from paperlib.cli import main
from paperlib.experiment import division, measure, networks, settings

CUT = {"epochs": 1, "max_steps": 10, "precision": "fp32", "permutations": 10, "threshold_sweep": [0.3, 0.5]}
SMALL = {"limit": 400, "model": "cct_2_3x2", "image_size": 16}
HOSTILE = "</script><script>document.title='hit'</script><b>"


@contextmanager
def measured(folder, profile, changes):
    """A run whose trained and random network are measured, with readouts that are hardly solved."""

    def roughly(data, unseen, labels, log=print, beside=False):
        return optimum.Choice(optimum.solve(data, 1.0, None, 0.3), [{"l2": 1.0, "accuracy": 0.0}])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERLIB_RUNS", str(folder))
        patch.setattr(measure, "ONCE", ())
        patch.setattr(measure, "FOLDS", 3)
        patch.setattr(snp, "ROTATIONS", 1)
        patch.setattr(optimum, "choose", roughly)
        run = settings.open_run(profile, CUT | changes)
        for kind in ("trained", "random"):
            division.specialisation(run, 0, kind)
        yield run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with measured(tmp_path_factory.mktemp("runs"), "quick", SMALL) as run:
        yield run


@pytest.fixture(scope="module")
def path(run, tmp_path_factory):
    """The page, with a label whose name is a script."""
    images = replace(run.images, classes=(HOSTILE, *run.images.classes[1:]))
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    path.write_text(page_explorer.page(replace(run, images=images, known_sha256=run.data_sha256)))
    assert path.stat().st_size < 6e6
    return path


@pytest.fixture
def fields():
    """Nodes without a positive field, with ties, and at hundredths of their largest entry."""
    torch.manual_seed(0)
    made = torch.randn(40, 12, 12) + 0.5 * torch.eye(12)
    made[0] = -made[0].abs()
    made[1] = made[1].sign()
    made[2:12] = torch.tensor(page_explorer.THRESHOLDS)[torch.randint(99, (10, 12, 12))]
    made[2:12, 0, 0] = 1.0
    return made


def test_levels_hold_every_boolean_matrix(fields):
    level = page_explorer.levels(fields)
    assert level.dtype == torch.int8 and level.min() >= -100
    for at, threshold in enumerate(page_explorer.THRESHOLDS, start=1):
        assert torch.equal(level >= at, snp.boolean_matrices(fields, threshold))
    below = fields[20] < 0
    share = (100 * fields[20] / fields[20].max())[below].clamp(min=-100)
    assert (level[20][below] - share).abs().max() <= 0.5001


def test_the_snr_of_a_tap_at_every_threshold(fields):
    found = page_explorer.tap_snr(page_explorer.levels(fields))
    for at in (1, 17, 30, 99):
        snr = snp.tap_statistics(snp.boolean_matrices(fields, at / 100)).snr
        assert found[at - 1] == (None if snr != snr else pytest.approx(snr, abs=6e-4))


def test_what_is_not_measured_is_said_with_the_command(folders, capsys):
    assert main(["explore", "quick", "--set", "limit=400"]) == 2
    said = capsys.readouterr().err
    assert "python -m paperlib measure quick" in said and len(said.splitlines()) == 1


def fields_of(run, network, name):
    """Fields (D, L, L) of all nodes of a tap, from the stages."""
    kind = "random" if network == "random" else "trained"
    weight = measure.readouts(run, 0, kind).tensors("weights")[f"{name}/best"]
    means = measure.nodes(run, 0, kind).tensors("means")[name]
    if network == "rotated":
        known = taps.places(networks.load_network(run, 0, kind)[0], page_explorer.TAPS)
        turn = measure.rotations(0, next(place for place in known if place.name == name), weight.shape[2])[0]
        weight, means = snp.rotated(weight, turn), snp.rotated(means, turn)
    return snp.field_matrices(weight, means)


@pytest.fixture
def opened(browser, path):
    """The page in a browser; nothing is asked for, nothing goes wrong."""
    page, errors, requests = watched(browser)
    page.goto(path.as_uri())
    page.locator("body[data-ready]").wait_for(timeout=30_000)
    yield page
    assert page.title() == "quick: single nodes by hand"
    assert errors == [] and requests == [path.as_uri()]


@pytest.mark.slow
def test_the_browser_counts_as_python_does(run, opened):
    views = opened.evaluate("data.views")
    assert {(view["network"], view["encoder"]) for view in views} == {
        (network, encoder) for network in ("trained", "random", "rotated") for encoder in (1, 2)
    }
    for view in views:
        fields = fields_of(run, view["network"], f"{view['encoder']}.{view['tap']}")
        for at in (5, 20, 30, 61, 95):
            found = snp.node_statistics(snp.boolean_matrices(fields, at / 100))
            said = opened.evaluate(
                "([view, at]) => view.nodes.map((_, stop) => statisticsOf(matrixAt(view.start + stop), at))", [view, at]
            )
            for name, own in zip(view["nodes"], said, strict=True):
                if name.startswith("node"):
                    node = int(name.split()[1])
                    numbers = {key: value[node].item() for key, value in asdict(found).items()}
                    assert {key: own[key] for key in numbers} == numbers
        table = measure.nodes(run, 0, "random" if view["network"] == "random" else "trained").table("taps")
        basis = "rotated-0" if view["network"] == "rotated" else "native"
        where = (table.encoder == view["encoder"]) & (table.tap == view["tap"]) & (table.basis == basis)
        for row in table[where & ~table.centred].itertuples():
            assert view["snr"][round(100 * row.threshold) - 1] == pytest.approx(row.snr, rel=0.01)


@pytest.mark.slow
def test_whole_heads_are_those_of_the_table(run, opened):
    for view in opened.evaluate("data.views.filter(view => view.tap === 'attn' && view.network !== 'rotated')"):
        table = division.specialisation(run, 0, view["network"]).table("heads")
        table = table[(table.encoder == view["encoder"]) & ~table.centred].set_index("head")
        for head, row in table.iterrows():
            script = "([view, head]) => statisticsOf(matrixAt(view.start + view.stops['head ' + head]), data.threshold)"
            said = opened.evaluate(script, [view, head])
            assert [said[key] for key in ("labels", "external")] == pytest.approx([row.labels, row.external], abs=2)
            assert len(view["owned"][head]) == row.owned


@pytest.mark.slow
def test_the_page_answers_to_hands_and_keys(opened):
    order = "JSON.stringify(shownOf(state.network).order)"
    before, said = opened.evaluate(order), opened.locator("#said").text_content()
    opened.locator("#threshold").focus()
    for _ in range(25):
        opened.keyboard.press("ArrowRight")
    assert opened.locator("#level").text_content().startswith("0.55")
    assert opened.evaluate(order) == before and opened.locator("#said").text_content() != said
    assert opened.locator("th.now").text_content() == "0.5"
    opened.get_by_role("button", name="random").click()
    assert opened.locator("button[aria-pressed=true]").count() == 1
    assert "random" in opened.locator("#which").text_content()
    opened.locator("#tap").select_option("attn")
    opened.locator("#stop").select_option("head 1")
    assert (
        "head 1 as a whole" in opened.locator("#which").text_content()
        and "owns" in opened.locator("#clusters").text_content()
    )
    cell = opened.locator("#cell").text_content()
    opened.locator("#field").focus()
    opened.keyboard.press("ArrowDown")
    assert opened.locator("#cell").text_content() != cell
    opened.locator("#boolean").hover()
    assert "→" in opened.locator("#cell").text_content()
    assert opened.evaluate("data.classes[0]") == HOSTILE
    slowest = opened.evaluate(
        """() => Math.max(...[...Array(20).keys()].map(step => {
            const start = performance.now();
            document.getElementById("threshold").value = 20 + step;
            document.getElementById("threshold").oninput();
            return performance.now() - start;
        }).slice(2))"""
    )
    assert slowest < 400  # tens of milliseconds on a machine that does nothing else


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(opened, scheme):
    opened.set_viewport_size({"width": 390, "height": 844})
    opened.emulate_media(color_scheme=scheme)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    corner = opened.evaluate("[...$('field').getContext('2d').getImageData(3, 3, 1, 1).data]")
    assert corner[3] == 255


@pytest.mark.slow
def test_the_command_writes_texts_as_words(browser, tmp_path, capsys):
    changes = {"limit": 400}
    with measured(tmp_path, "quick-text", changes) as run:
        capsys.readouterr()
        assert (
            main(["explore", "quick-text", "--set", *(f"{name}={value}" for name, value in (CUT | changes).items())])
            == 0
        )
    path = run.output / "explorer.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    page, errors, _ = watched(browser)
    page.goto(path.as_uri())
    page.locator("body[data-ready]").wait_for(timeout=30_000)
    said = page.locator("#drivers q").first.text_content().split()
    assert len(said) >= 3 and set(said) <= {*run.images.words, "…"} and not page.locator(".picture").count()
    assert errors == []
