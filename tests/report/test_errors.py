"""What AP50 is lost to, on the page: only what the runs noted, and of changes only what the seeds agree on."""

from __future__ import annotations

from pathlib import Path

from detdistill.report import words
from detdistill.report.page import build_report
from detdistill.report.runs import Group, group, read
from tests.report.runs import errors, write_run
from tests.report.test_report import parsed


def write_pairs(folder: Path, baselines: list[dict[str, float]], distilled: list[dict[str, float]]) -> list[Path]:
    runs = []
    for seed, (plain, taught) in enumerate(zip(baselines, distilled, strict=True)):
        runs.append(write_run(folder / f"baseline{seed}", "baseline", 0.30, seed=seed, errors=plain))
        teacher = errors(Miss=0.07)
        runs.append(
            write_run(folder / f"pkd{seed}", "distilled", 0.33, seed=seed, method="pkd", errors=taught, teacher_errors=teacher)
        )
    return runs


def groups_of(folders: list[Path]) -> list[Group]:
    return group([read(folder) for folder in folders])


def test_page_shows_what_each_model_loses(tmp_path: Path) -> None:
    baselines = [errors(Miss=0.20), errors(Miss=0.22)]
    runs = write_pairs(tmp_path / "runs", baselines, [errors(Miss=0.16, Bkg=0.03), errors(Miss=0.20, Bkg=0.04)])
    page = build_report(runs, tmp_path / "report.html")
    parser, text = parsed(page)
    assert (
        "pkd: the student loses 3.0 less to missed objects, but 1.5 more to background than without distillation "
        "(points of AP50, mean of 2 seeds, which agree on the direction)."
    ) in text
    assert "AP50 Cls Loc Both Dupe Bkg Miss FalsePos FalseNeg" in text
    assert "teacher 40.0 5.0 10.0 1.0 0.0 2.0 7.0 12.0 30.0" in text
    assert "baseline 40.0 5.0 10.0 1.0 0.0 2.0 21.0 12.0 30.0" in text
    assert "pkd 43.0 5.0 10.0 1.0 0.0 3.5 18.0 12.0 30.0" in text
    assert any(
        attributes.get("aria-label") == "AP50 lost to each kind of error" for tag, attributes in parser.tags if tag == "svg"
    )
    assert any(attributes.get("href") == "#errors" for _, attributes in parser.tags)


def test_older_runs_have_no_such_section_and_mixed_ones_show_what_is_known(tmp_path: Path) -> None:
    old = [write_run(tmp_path / "a", "baseline", 0.3), write_run(tmp_path / "b", "distilled", 0.4, method="pkd", errors={})]
    _, text = parsed(build_report(old, tmp_path / "old.html"))
    assert "What AP50 is lost to" not in text
    new = write_run(tmp_path / "c", "distilled", 0.4, method="cwd", kd_terms=("cwd",), errors=errors())
    _, text = parsed(build_report([*old, new], tmp_path / "mixed.html"))
    assert "cwd 50.0 5.0 10.0" in text
    assert "cwd: no baseline with the same seed noted its errors." in text
    alone = write_run(tmp_path / "d", "train", 0.4, errors=errors())
    _, text = parsed(build_report([alone], tmp_path / "alone.html"))
    assert "fcos:small 50.0 5.0 10.0" in text


def test_sentence_speaks_of_what_the_seeds_agree_on(tmp_path: Path) -> None:
    apart = groups_of(write_pairs(tmp_path / "a", [errors(), errors()], [errors(Miss=0.10), errors(Miss=0.21)]))
    said = words.error_sentence("pkd", *apart)
    assert said == "pkd: no kind of error changed by 0.5 AP50 or more in the same direction in all seeds."
    agreed = groups_of(
        write_pairs(tmp_path / "b", [errors(), errors()], [errors(Cls=0.03, Miss=0.199), errors(Cls=0.03, Loc=0.06)])
    )
    assert words.error_sentence("pkd", *agreed) == (
        "pkd: the student loses 2.0 less to wrong classes than without distillation (points of AP50, mean of 2 seeds, which "
        "agree on the direction)."
    )


def test_no_sentence_on_one_seed_or_on_nothing(tmp_path: Path) -> None:
    one = groups_of(write_pairs(tmp_path / "a", [errors()], [errors(Cls=0.03)]))
    assert words.error_sentence("pkd", *one) == "pkd: one seed, so no change of a kind of error can be told from chance."
    zero = [write_run(tmp_path / role, role, 0.001, errors=errors(), method="pkd") for role in ("baseline", "distilled")]
    assert words.error_sentence("pkd", *groups_of(zero)) == "pkd: AP is near 0, so the kinds of errors say nothing."
