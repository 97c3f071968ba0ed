"""The report: complete, self-contained, and deaf to what names from outside say."""

import json
import re

from paperlib.cli import main, report

HOSTILE = '<script>document.title="hit"</script><img src="https://example.org/x" onerror="document.title=1">'


def test_the_report_has_every_figure_table_and_setting(quick_figures):
    html = report.page(quick_figures)
    summary = json.loads((quick_figures / "summary.json").read_text())
    assert html.count("<figure") == len(list(quick_figures.glob("*.png"))) == html.count('download="') - 1
    for name in summary["config"]:
        assert f"<td>{name}</td>" in html
    for row in summary["verdicts"]:
        assert row["verdict"] in html
    assert "Choices" in html and "Unknown" in html and "demonstration" in html


def test_the_report_asks_for_nothing_from_outside(quick_figures):
    html = report.page(quick_figures)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#|https://)[^"']*""", html)
    assert not re.findall(r"""src=["']https?:""", html) and "<script" not in html


def test_hostile_names_are_text(quick_figures):
    summary = json.loads((quick_figures / "summary.json").read_text())
    summary["data"]["name"] = summary["verdicts"][0]["statistic"] = HOSTILE
    (quick_figures / "summary.json").write_text(json.dumps(summary))
    html = report.page(quick_figures)
    assert "<script" not in html and '<img src="https' not in html and "&lt;script&gt;" in html


def test_a_figure_without_a_caption_is_refused(quick_figures, refuses):
    (quick_figures / "new.png").write_bytes(b"")
    with refuses("no caption for the figure new"):
        report.page(quick_figures)


def test_figures_of_notebooks_that_the_summary_does_not_know_are_left_out(quick_figures):
    """They may have been made with other settings."""
    summary = json.loads((quick_figures / "summary.json").read_text())
    summary["results"] = {"01_train_cct": summary["results"]["01_train_cct"]}
    (quick_figures / "summary.json").write_text(json.dumps(summary))
    assert re.findall(r'<figure id="(\w+)"', report.page(quick_figures)) == ["learning_curve"]


def test_figures_of_other_settings_are_refused(quick_figures, refuses):
    """A profile was edited, or a notebook stopped half-way: pictures are newer than verdicts."""
    summary = json.loads((quick_figures / "summary.json").read_text())
    summary["config"]["epochs"] += 1
    (quick_figures / "summary.json").write_text(json.dumps(summary))
    with refuses("learning_curve.png was drawn with other settings or data than summary.json says"):
        report.page(quick_figures)


def test_stages_whose_code_has_changed_since_are_named(quick_figures):
    summary = json.loads((quick_figures / "summary.json").read_text())
    assert "Code has changed since" not in report.page(quick_figures)
    name = next(iter(summary["stages"]))
    summary["stages"][name] |= {"changed_since": ["snp"], "machine": "3 CPU threads (AVX9)"}
    (quick_figures / "summary.json").write_text(json.dumps(summary))
    html = report.page(quick_figures)
    assert re.search(rf"Code has changed since 1 of these stages were computed:\s*{name}", html)
    assert re.search(rf"<td>{name}</td>.*\n<td>3 CPU threads \(AVX9\)</td>.*<td>snp</td>", html)


def test_figures_of_the_first_seed_say_so(quick_figures):
    summary = json.loads((quick_figures / "summary.json").read_text())
    summary["seeds"] = [0, 1, 2]
    (quick_figures / "summary.json").write_text(json.dumps(summary))
    html = report.page(quick_figures)
    first = [name for name in report.FIRST_SEED if (quick_figures / f"{name}.png").exists()]
    assert first and html.count("n = 1 (first seed).") == len(first)
    assert html.count("n = 3.") == html.count("<figure") - len(first)


def test_a_missing_run_is_one_sentence(folders, capsys):
    assert main(["report", "quick"]) == 2
    assert "summary.json" in capsys.readouterr().err
