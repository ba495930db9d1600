import pytest

from data.errors import DataError
from data.masking.template_check import check_template
from tests.data.conftest import CHATML
from tests.helpers.templates import GENERATION, THINKING, finder


def verdicts(source):
    report = check_template(finder(source))
    return report, {result.name: result.verdict for result in report.results}


@pytest.mark.parametrize("source", [CHATML, THINKING, GENERATION])
def test_good_templates_are_usable_and_never_wrong(source):
    report, found = verdicts(source)
    report.require_usable()
    assert "wrong" not in found.values()
    assert {found[name] for name in ("one turn", "three turns", "system", "unicode")} == {"exact"}
    assert report.stops == ["<|im_end|>"]
    assert report.stops_last
    assert report.stop_is_token


def test_blocks_that_enclose_the_question_are_wrong_and_stop_the_run():
    source = GENERATION.replace("message.role == 'assistant'", "message.role == 'user'")
    report, found = verdicts(source)
    assert found["one turn"] != "exact"
    with pytest.raises(DataError, match="cannot be masked: probe 'one turn'"):
        report.require_usable()


def test_block_that_leaves_out_a_word_disagrees_with_marks():
    source = GENERATION.replace(
        "{%- generation %}{{ message.content + '<|im_end|>\\n' }}",
        "{{- 'Well: ' }}{% generation %}{{ message.content + '<|im_end|>\\n' }}",
    )
    report, found = verdicts(source)
    assert found["three turns"] == "wrong"
    with pytest.raises(DataError, match="blocks give .* marks give"):
        report.require_usable()


def test_template_that_ends_no_last_turn_is_told():
    source = CHATML.replace("'<|im_end|>\\n'", "('' if loop.last else '<|im_end|>\\n')")
    report, _ = verdicts(source)
    assert not report.stops_last


@pytest.mark.parametrize("policy", ["keep", "last", "mask"])
def test_templates_that_drop_earlier_reasoning_are_for_the_policies_that_train_none(policy):
    report = check_template(finder(THINKING, reasoning=policy))
    report.require_usable()
    found = {result.name: result.verdict for result in report.results}
    assert found["reasoning"] == "exact"
    assert found["reasoning in an earlier turn"] == ("refused" if policy == "keep" else "exact")
