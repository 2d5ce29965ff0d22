import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from detdistill import printing
from detdistill.progress import Progress


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=30)


def shown(console):
    return console.file.getvalue().splitlines()


def test_text_wraps_between_words_only():
    lines = printing.wrap("one-stage detectors of\ntwo kinds", 12)
    assert [str(line) for line in lines] == ["one-stage", "detectors of", "two kinds"]
    assert printing.wrap("", 12)[0] == Text("")


def test_a_long_word_is_a_line_and_a_command_stays_together_where_it_can():
    path = "runs/a/path/that/is/long"
    lines = [str(line) for line in printing.wrap(f"see {path} or `git log -1`; `git log --oneline --graph`", 14)]
    assert lines == ["see", path, "or", "`git log -1`;", "`git log", "--oneline", "--graph`"]


def test_wide_characters_count_twice():
    assert [str(line) for line in printing.wrap("猫猫 犬犬 a", 7)] == ["猫猫", "犬犬 a"]


def test_styles_survive_wrapping():
    first, second = printing.wrap(Text.from_markup("[red]red words[/red] plain"), 9)
    assert (str(first), [span.style for span in first.spans]) == ("red words", ["red"])
    assert (str(second), second.spans) == ("plain", [])


def test_paragraphs_hang_below_what_stands_before_them(console):
    printing.paragraph(console, "several words that need two lines", first="pkd: ")
    printing.paragraph(console, "several words that need two lines", first="note ", indent=2)
    assert shown(console) == [
        "pkd: several words that need",
        "     two lines",
        "note several words that need",
        "  two lines",
    ]


def test_a_word_too_wide_for_its_paragraph_moves_left(console):
    printing.paragraph(console, "see runs/of/twenty-six/columns or runs/of/more/than/thirty/columns", first="      ")
    assert shown(console) == [
        "      see",
        "    runs/of/twenty-six/columns",
        "      or",
        "runs/of/more/than/thirty/columns",
    ]
    printing.paragraph(console, "runs/of/twenty-six/columns", first="[name]")
    assert shown(console)[4:] == ["[name]", "    runs/of/twenty-six/columns"]


def test_long_names_stand_above_their_entries(console):
    printing.entries(console, [("pkd", ["one line", "another one"]), ("a_name_of_20_columns", ["text"]), ("alone", [])])
    assert shown(console) == ["pkd    one line", "       another one", "a_name_of_20_columns", "       text", "alone"]


def test_names_stand_beside_their_label_or_below_it(console):
    printing.labelled(console, "teacher", "runs/a folder")
    printing.labelled(console, "teacher", "runs/a folder with a longer name")
    assert shown(console) == ["teacher runs/a folder", "teacher", "runs/a folder with a longer name"]


def test_tables_align_numbers_right_and_never_cut(console):
    rows = [("cat", "1.0", "ok"), ("a very long name of a class", "100.0", "too long"), ("[red]", "-", Text("x"))]
    printing.table(console, ("class", "AP", "word"), rows, left=("word",), indent=1)
    assert shown(console) == [
        " class     AP  word",
        " cat      1.0  ok",
        " a very long name of a class",
        "        100.0  too long",
        " [red]      -  x",
    ]


def test_a_table_wider_than_the_line_stays_whole(console):
    printing.table(console, ("name", "number"), [("n", "1" * 40)])
    assert shown(console) == ["name", " " * 36 + "number", "n", "  " + "1" * 40]


def test_a_grid_has_as_many_columns_as_fit(console):
    printing.grid(console, {"AP": "42.3", "AR100": "100.0", "ARl": "-"}, per_line=2)
    assert shown(console) == ["     AP  AR100", "   42.3  100.0", "    ARl", "      -"]
    narrow = Console(file=io.StringIO(), width=8)
    printing.grid(narrow, {"AP": "42.3", "AR1": "1.0"})
    assert shown(narrow) == ["    AP", "  42.3", "   AR1", "   1.0"]


@pytest.mark.parametrize("terminal", [True, False])
def test_messages_beside_the_progress_keep_paths_whole(terminal):
    console = Console(file=io.StringIO(), width=30, force_terminal=terminal)
    path = "runs/a/folder/of/more/than/thirty/columns"
    with Progress(console) as progress:
        progress.say(f"the teacher {path} is not scored :cat:", "yellow")
    text = console.file.getvalue()
    assert path in text
    assert ":cat:" in text
    assert ("\x1b[33m" in text) == terminal


def test_numbers_and_times_of_a_bar_stay_whole_on_a_narrow_terminal():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with Progress(console) as progress:
        progress.bar("baseline, seed 0", 750).update(301, "AP 12.3  classification 0.38 bbox_regression 0.26 bbox_ctrness 0.63")
        progress.rich.refresh()
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines() if line.strip()]
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert re.search(r"^baseline, seed 0 \S+ +301/750 +\d:\d\d:\d\d \S+ AP 12\.3  classif.*…$", lines[-1].rstrip()), lines[-1]


def test_a_title_too_long_for_its_bar_is_cut_instead_of_its_numbers():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with Progress(console) as progress:
        progress.bar("score the teacher", 128).update(128)
        progress.bar("distil (unikd,extractor_epochs=1,queries=20)", 104000).update(52000, "AP 0.0")
        progress.rich.refresh()
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines() if line.strip()]
    assert re.search(r"^score the teacher +\S+ +128/128 +\d:\d\d:\d\d \d:\d\d:\d\d *$", lines[-2]), lines[-2]
    assert re.search(r"^distil \(unikd,\S+… \S+ +52000/104000 \d:\d\d:\d\d -:--:-- A…$", lines[-1].rstrip()), lines[-1]
    assert all(len(line.rstrip()) <= 80 for line in lines)
