"""What processes hold and send, by hand for small numbers; and the tables of docs/scaling.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.plan import scaling
from finetune.plan.held import held
from finetune.plan.launches import Launch, launches
from finetune.plan.traffic import Passes, Traffic, traffic
from finetune.plan.weights import Weight

DOC = Path(__file__).parents[2] / "docs" / "scaling.md"
# 40 numbers train, in tensors of 30 and 10; 100 are frozen, of 2 bytes
TRAINED = [Weight((10, 3), group="g", unit="0"), Weight((10,), group="g", unit="1")]
FROZEN = [Weight((20, 5), 2, unit="0")]
WEIGHTS = TRAINED + FROZEN
STATES = 8 * 40
ZERO1, ZERO2 = (
    Launch(name=kind, kind=kind, bucket=7, buffers=buffers) for kind, buffers in (("zero1", 1), ("zero2", 2))
)
ZERO3 = Launch(name="zero3", kind="zero3", bucket=7, persistent=10, reuse=0, prefetch=13)
FSDP2 = Launch(name="fsdp2", kind="fsdp2")


@pytest.mark.parametrize("world", [1, 4])
def test_under_ddp_all_is_whole_and_buckets_are_the_gradients(world: int) -> None:
    found = held(WEIGHTS, Launch(name="ddp", kind="ddp"), world, STATES)
    assert (found.frozen, found.trained, found.gradients, found.optimizer) == (200, 160, 160, 320)
    assert found.device == 840 and found.on_host == 0


def test_zero_1_and_2_deal_out_the_optimizer_its_copies_and_the_gradients_that_reach_in() -> None:
    # a line of 40, stretches of 10: three of them within the tensor of 30, whose gradient they have whole
    found = held(WEIGHTS, ZERO1, 4, STATES)
    assert (found.frozen, found.trained, found.copies, found.optimizer) == (200, 160, 40, 80)
    assert found.gradients == 30 * 4 and found.buffers == 7 * 4
    assert held(WEIGHTS, ZERO2, 4, STATES).buffers == 2 * 7 * 4
    assert held(WEIGHTS, ZERO1, 4, STATES, accumulation=2).gradients == 160
    assert held(WEIGHTS, ZERO2, 4, STATES, accumulation=2).gradients == 120


def test_a_line_is_filled_up_to_a_multiple_of_twice_the_processes() -> None:
    found = held(TRAINED, ZERO2, 3, STATES)  # 40 -> 42, stretches of 14
    assert (found.trained, found.copies, found.optimizer) == (42 * 4, 14 * 4, 14 * 8)


def test_zero_3_deals_out_all_but_keeps_small_tensors_whole_besides() -> None:
    found = held(WEIGHTS, ZERO3, 4, STATES)
    # pieces of 8 and 3 numbers, and the tensor of 10; of the frozen one 25
    assert (found.frozen, found.trained) == (25 * 2, (8 + 3 + 10) * 4)
    assert (found.copies, found.gradients, found.optimizer) == (44, 44, 88)
    assert found.gathered == (30 * 4 + 100 * 2) / 10  # 13 of 130 numbers


def test_fsdp2_cuts_rows_and_gathers_two_blocks_with_their_gradients() -> None:
    found = held(WEIGHTS, FSDP2, 4, STATES)
    # 10 rows of 3 in pieces of 3 rows, 10 numbers in pieces of 3, 20 rows of 5 in pieces of 5
    assert (found.trained, found.gradients, found.optimizer, found.frozen) == (48, 48, 96, 25 * 2)
    assert found.copies == 0 and found.gathered == (30 * 8 + 200) + 10 * 8


def test_what_is_not_dealt_out_stays_whole() -> None:
    beside = [*WEIGHTS, Weight((50,), 2, dealt=False)]
    for launch in (ZERO3, FSDP2):
        assert held(beside, launch, 4, STATES).frozen == held(WEIGHTS, launch, 4, STATES).frozen + 100


@pytest.mark.parametrize("name", ["zero2-offload", "zero3-offload", "fsdp2-offload"])
def test_offloading_takes_the_optimizer_from_the_device(name: str) -> None:
    plain, moved = (launches()[one] for one in (name.removesuffix("-offload"), name))
    assert held(WEIGHTS, plain, 4, STATES).optimizer > 0
    found = held(WEIGHTS, moved, 4, STATES)
    assert found.optimizer == found.copies == 0 and found.host["optimizer"] == held(WEIGHTS, plain, 4, STATES).optimizer


def test_a_ring_sends_n_minus_1_of_n_and_an_all_reduce_twice_that() -> None:
    assert Traffic(all_reduce=160).sent(4) == 2 * 120
    assert Traffic(all_gather=160, reduce_scatter=80).sent(4) == 120 + 60
    assert Traffic(all_reduce=160).sent(1) == 0


def test_what_is_sent_in_a_step() -> None:
    twice = Passes(accumulation=2)
    assert traffic(WEIGHTS, Launch(name="ddp", kind="ddp"), 4, twice) == Traffic(all_reduce=160)
    assert traffic(WEIGHTS, ZERO1, 4, twice) == Traffic(all_reduce=160, all_gather=160)
    assert traffic(WEIGHTS, ZERO2, 4, twice) == Traffic(all_reduce=320, all_gather=160)
    # the tensor of 10 once, those of 30 and 100 in each forward and backward pass, in multiples of the processes
    large = 32 * 4 + 100 * 2
    assert traffic(WEIGHTS, ZERO3, 4) == Traffic(all_gather=12 * 4 + 2 * large, reduce_scatter=(32 + 12) * 4)
    # rows: 12 x 3, 12, and 20 x 5 frozen ones
    whole = (36 + 12) * 4 + 200
    assert traffic(WEIGHTS, FSDP2, 4, twice) == Traffic(all_gather=2 * 2 * whole, reduce_scatter=2 * 48 * 4)
    assert all(traffic(WEIGHTS, one, 1) == Traffic() for one in (ZERO1, ZERO3, FSDP2))


def test_profiles_are_read_as_they_are_shipped() -> None:
    known = launches()
    assert (known["zero3"].persistent, known["zero3"].reuse, known["zero3"].deals_weights) == (10**5, 5 * 10**8, True)
    assert (known["zero1"].buffers, known["zero2"].buffers, known["zero1"].bucket) == (1, 2, 5 * 10**7)
    assert known["zero3-offload"].offload_weights and known["zero2-offload"].offload_optimizer
    assert known["cpu-2"].cpu and known["ddp-nodes"].machines > 1
    assert (known["fsdp2"].reshard, known["fsdp2-offload"].offload_weights) == (True, True)


def test_the_document_has_the_tables_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main([])
    begin, end = "<!-- python -m finetune.plan.scaling -->\n", "\n<!-- end -->"
    assert DOC.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0] == capsys.readouterr().out
