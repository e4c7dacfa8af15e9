"""What ops are handed is counted by row: what a query sees, once for a group of heads, whatever lies around it."""

import inspect
from threading import Thread

import pytest
import torch

import kernels
import kernels.attend_quantized
from kernels import Pages, Rules, attend, attend_chosen, attend_pages, attend_with_mass, mass, reads
from kernels.attend_quantized import attend_quantized
from kernels.quantize import quantize
from tests.bounds import bound, near

D, RULES = 8, Rules(1.0)
SLOT = 2 * D * 4  # keys and values of a head's slot in float32


def slots(B: int, H: int, S: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, S, D), torch.randn(B, H, S, D)


def by_row(turn: reads.Turn) -> list[int]:
    found, apart = turn.read, [size * n for size, counts in turn.read.apart.items() for n in counts]
    listed = found.listed or [0] * found.rows
    return [found.same + listed[row] + sum(int(n[row]) for n in apart) for row in range(found.rows)]


def read(do, B: int = 1) -> list[int]:
    """Bytes of every row that ops are handed in a turn."""
    turn = reads.Turn(B)
    with turn:
        do()
    return by_row(turn)


def at(B: int, n: int) -> dict:
    """Positions of n slots and of a query behind them."""
    return {"q_pos": torch.full((B, 1), n), "k_pos": torch.arange(n).expand(B, 1, n)}


def test_a_view_counts_its_elements_and_not_the_buffer_behind_it():
    (k, v), q = slots(1, 2, 1000), torch.randn(1, 4, 1, D)
    one = read(lambda: attend(q, k[:, :, :16], v[:, :, :16], RULES, **at(1, 16)))
    assert one == [2 * 16 * SLOT]
    assert read(lambda: attend(q, k, v, RULES, **at(1, 1000), layout="all")) == [2 * 1000 * SLOT]


def test_padding_and_what_lies_outside_a_window_is_no_rows():
    (k, v), q = slots(3, 2, 10), torch.randn(3, 2, 1, D)
    k_pos = torch.tensor([[*range(10)], [-1] * 4 + [*range(6)], [-1] * 10])[:, None]
    q_pos = k_pos.amax(-1)
    assert read(lambda: attend(q, k, v, RULES, q_pos=q_pos, k_pos=k_pos), 3) == [20 * SLOT, 12 * SLOT, 0]
    near = Rules(1.0, window=3)
    assert read(lambda: attend(q, k, v, near, q_pos=q_pos, k_pos=k_pos, layout="all"), 3) == [6 * SLOT, 6 * SLOT, 0]
    two = torch.cat((q_pos - 1, q_pos), dim=1)  # two queries see one slot more between them
    q = torch.randn(3, 2, 2, D)
    assert read(lambda: attend(q, k, v, near, q_pos=two, k_pos=k_pos), 3)[:2] == [8 * SLOT, 8 * SLOT]


def test_heads_that_are_one_in_memory_are_read_once():
    (k, v), q = slots(1, 1, 10), torch.randn(1, 4, 1, D)
    k, v = k.expand(1, 4, 10, D), v.expand(1, 4, 10, D)
    assert read(lambda: attend(q, k, v, RULES, **at(1, 10))) == [10 * SLOT]


def test_what_several_ops_of_a_turn_are_handed_is_read_once_and_by_the_next_token_again():
    (k, v), q = slots(1, 2, 10), torch.randn(1, 2, 1, D)

    def turn(again):
        attend(q, k, v, RULES, **at(1, 10))
        again()
        mass(q, k, RULES, **at(1, 10))
        attend_with_mass(q, k, v, RULES, 1, **at(1, 10))

    assert read(lambda: turn(lambda: None)) == [20 * SLOT]
    assert read(lambda: turn(reads.next_token)) == [40 * SLOT]


def test_copies_that_take_each_others_place_in_memory_are_read_each():
    k, q = torch.randn(1, 2, 1000, D), torch.randn(1, 2, 1, D)

    def turn():
        for i in range(5):
            part = k[:, :, i::5].clone()
            attend(q, part, part, RULES, **at(1, 200))
            del part

    assert read(turn) == [2 * 1000 * D * 4]


def test_a_choice_by_query_head_is_read_once_for_its_group_and_gives_what_a_mask_gives():
    (k, v), q = slots(2, 2, 6), torch.randn(2, 4, 1, D)
    k_pos = torch.tensor([[0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3]])[:, None]
    q_pos = torch.tensor([[6], [4]])
    here = torch.tensor([[0, 1, -1], [1, 2, -1], [3, 4, 5], [5, 4, 3]]).repeat(2, 1, 1)
    out, logit = [], (q.abs().amax(-1).max() * k.abs().sum(-1).max()).item()
    found = read(lambda: out.append(attend_chosen(q, k, v, here, RULES, q_pos=q_pos, k_pos=k_pos)), 2)
    assert found == [6 * SLOT, 4 * SLOT]  # 0, 1, 2 and 3, 4, 5; in the second row two of them are padding
    for head in range(4):
        mask = torch.full((6,), -torch.inf).index_fill(0, here[0, head][here[0, head] >= 0], 0.0)
        mask = mask + torch.where(k_pos[:, 0] < 0, -torch.inf, 0.0)
        p = (torch.einsum("bd,bsd->bs", q[:, head, 0], k[:, head // 2]) + mask).softmax(-1)
        expected = torch.einsum("bs,bsd->bd", p.nan_to_num(), v[:, head // 2])
        near(out[0][:, head, 0], expected, bound(torch.float32, 6, logit, size=v.abs().max().item(), width=D))
    group = here[:, ::2]  # one choice for all query heads of a KV head
    assert read(lambda: attend_chosen(q, k, v, group, RULES, q_pos=q_pos, k_pos=k_pos), 2) == [5 * SLOT, 3 * SLOT]


def test_codes_are_read_with_their_scales_and_what_is_not_packed():
    (k, v), q = slots(2, 2, 40), torch.randn(2, 4, 1, D)
    codes = [quantize(x[:, :, :32], bits=2, group=8, dim=3, zero="float") for x in (k, v)]
    both = [(one, x[:, :, 32:]) for one, x in zip(codes, (k, v))]
    found = read(lambda: attend_quantized(q, *both, RULES, **at(2, 40), layout="all"), 2)
    assert found == [2 * 2 * (32 * (D // 4 + 2 + 2) + 8 * D * 4)] * 2


@pytest.mark.parametrize("window", [None, 3])
def test_pages_and_their_tail_are_read_as_far_as_a_row_holds_them(window):
    B, H, held = 2, 2, torch.tensor([4, 2, 1, 3])
    total, first = int(held.sum()), held.cumsum(0) - held
    k, v, pos = torch.randn(total, D), torch.randn(total, D), torch.cat([torch.arange(n) for n in held.tolist()])
    table = Pages(k, v, pos.int(), torch.arange(total).int(), first, held, 4)
    (tk, tv), q = slots(B, H, 1), torch.randn(B, 2 * H, 1, D)
    tail = tk, tv, torch.full((B, H, 1), 4, dtype=torch.int32)
    q_pos = torch.full((B, 1), 4, dtype=torch.int32)
    found = read(lambda: attend_pages(q, table, tail, Rules(1.0, window=window), q_pos=q_pos), B)
    assert found == ([(6 + 2) * SLOT, (4 + 2) * SLOT] if window is None else [(2 + 2) * SLOT, (1 + 2) * SLOT])


def test_rows_that_are_read_apart_are_told_apart_or_refused():
    (k, v), q = slots(3, 2, 10), torch.randn(3, 2, 1, D)

    def parts():
        for row in range(3):
            with reads.of_rows(slice(row, row + 1)):
                n = 4 + row
                one = k[row : row + 1, :, :n], v[row : row + 1, :, :n]
                attend(q[row : row + 1], *one, RULES, **at(1, n), layout="all" if row else "positions")

    assert read(parts, 3) == [8 * SLOT, 10 * SLOT, 12 * SLOT]
    with pytest.raises(ValueError, match="handed 2 rows where 3 are read"):
        read(lambda: attend(q[:2], k[:2], v[:2], RULES, **at(2, 10)), 3)


def test_what_no_op_is_handed_is_noted_and_what_is_made_of_less_counts_as_that():
    (k, v), q = slots(2, 2, 10), torch.randn(2, 2, 1, D)
    bounds, there = torch.randn(2, 2, 5, D), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:, None]
    assert read(lambda: reads.note(bounds, there=there), 2) == [2 * 5 * D * 4, 2 * 3 * D * 4]
    factor = torch.randn(2, 10, 2)

    def rebuilt():
        keys = k.clone()
        reads.instead(keys, factor)
        attend(q, keys, v, RULES, **at(2, 10))

    assert read(rebuilt, 2) == [10 * 2 * 4 + 2 * 10 * D * 4] * 2


def test_nothing_is_counted_where_nobody_counts():
    (k, v), q = slots(1, 2, 10), torch.randn(1, 2, 1, D)
    turn = reads.Turn(1)
    attend(q, k, v, RULES, **at(1, 10))
    reads.note(k)
    reads.moved(k)
    with reads.of_rows(slice(0, 1)):
        reads.next_token()
    assert not turn.read and not turn.moved


def test_what_slots_weigh_is_read_with_them():
    (k, v), q = slots(2, 2, 10), torch.randn(2, 4, 1, D)
    bias = torch.zeros(2, 2, 10)
    assert read(lambda: attend(q, k, v, RULES, **at(2, 10), bias=bias), 2) == [20 * (SLOT + 4)] * 2
    assert read(lambda: attend(q, k, v, RULES, **at(2, 10), bias=bias, factor=bias.exp()), 2) == [20 * (SLOT + 8)] * 2


def test_what_another_thread_reads_is_none_of_a_turns_and_an_error_ends_the_counting():
    (k, v), q = slots(1, 2, 10), torch.randn(1, 2, 1, D)
    turn = reads.Turn(1)
    with turn:
        thread = Thread(target=attend, args=(q, k, v, RULES), kwargs=at(1, 10))
        thread.start()
        thread.join()
    assert not turn.read
    with pytest.raises(KeyError), turn:
        attend(q, k, v, RULES, **at(1, 10))
        raise KeyError
    attend(q, k.clone(), v.clone(), RULES, **at(1, 10))
    assert by_row(turn) == [20 * SLOT]


def test_every_op_that_is_given_keys_is_counted():
    ops = {
        f"{module.__name__}.{name}": op
        for module in (kernels, kernels.attend_quantized)
        for name in module.__all__
        if inspect.isfunction(op := getattr(module, name))
    }
    takes = {name: set(inspect.signature(op).parameters) for name, op in ops.items()}
    given = {name for name, words in takes.items() if "q" in words and words & {"k", "keys", "pages"}}
    assert len(given) > 9
    assert {name for name in given if not hasattr(ops[name], "__wrapped__")} == set()
