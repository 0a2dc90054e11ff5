"""linear_kd_loss where the vocabulary, or the weight, is spread over processes."""

import itertools

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_ranks

import kdfast
from kdfast.reference import DIVERGENCES

VOCAB = 100
CUTS = {2: (37, 63), 3: (40, 1, 59)}


def inputs(bias=True):
    generator = torch.Generator().manual_seed(3)
    arguments = {}
    for owner, width in (("student", 8), ("teacher", 12)):
        arguments[f"{owner}_hidden"] = torch.randn(5, 3, width, generator=generator)
        arguments[f"{owner}_weight"] = torch.randn(VOCAB, width, generator=generator)
        if bias:
            arguments[f"{owner}_bias"] = torch.randn(VOCAB, generator=generator)
    labels = torch.randint(80, (5, 3), generator=generator)
    labels[1, 1] = -100
    return arguments, labels


def shard(arguments, begin, end):
    return {
        name: value if "hidden" in name else value[begin:end].clone()
        for name, value in arguments.items()
    }


def loss_and_gradients(arguments, labels, **options):
    students = {
        name: value.requires_grad_() for name, value in arguments.items() if "student" in name
    }
    loss = kdfast.linear_kd_loss(labels=labels, **arguments, **options)
    loss.sum().backward()
    return loss.detach(), {name: value.grad for name, value in students.items()}


def assert_whole(result, expected, begin, end):
    torch.testing.assert_close(result[0], expected[0], rtol=1e-6, atol=1e-7)
    for name, gradient in result[1].items():
        whole = expected[1][name]
        part = whole if "hidden" in name else whole[begin:end]
        assert (gradient - part).norm() < 1e-6 * whole.norm(), name


OPTIONS = [
    {"divergence": divergence, "beta": 0.3, **options}
    for divergence, options in itertools.product(
        DIVERGENCES,
        (
            {},
            {"alpha": 0.4, "chunk_size": 4},
            {"temperature": 2.0, "alpha": 0.4, "student_softcap": 5.0, "vocab_size": 88},
        ),
    )
]
OPTIONS += [
    {
        "temperature": torch.linspace(0.5, 2, 15).view(5, 3),
        "alpha": 0.5,
        "teacher_temperature": 3.0,
    },
    {"token_weight": torch.rand(5, 3), "alpha": 0.5, "num_items": 7, "student_logit_scale": 0.5},
    {"reduction": "none", "alpha": 0.5, "temperature": 2.0},
    {"reduction": "sum", "alpha": 0.2},
]


def _whole_on_every_rank(rank, options):
    group = dist.group.WORLD
    ends = list(itertools.accumulate(CUTS[dist.get_world_size()]))
    begin, end = [0, *ends][rank], ends[rank]
    for option in options:
        arguments, labels = inputs()
        expected = loss_and_gradients(dict(arguments), labels, **option)
        arguments, labels = inputs()
        result = loss_and_gradients(
            shard(arguments, begin, end), labels, process_group=group, **option
        )
        assert_whole(result, expected, begin, end)


@pytest.mark.parametrize("ranks", [2, 3])
def test_equals_one_process(ranks):
    run_on_ranks(ranks, _whole_on_every_rank, OPTIONS)


def _extreme(rank, edit):
    arguments, labels = inputs(bias=False)
    edit(arguments)
    expected = loss_and_gradients(dict(arguments), labels, alpha=0.5)
    arguments, labels = inputs(bias=False)
    edit(arguments)
    begin, end = (0, 50) if rank == 0 else (50, 100)
    result = loss_and_gradients(
        shard(arguments, begin, end), labels, alpha=0.5, process_group=dist.group.WORLD
    )
    torch.testing.assert_close(result[0], expected[0])
    for name, gradient in result[1].items():
        whole = expected[1][name]
        whole = whole if "hidden" in name else whole[begin:end]
        torch.testing.assert_close(gradient, whole, rtol=1e-4, atol=1e-5, equal_nan=True)


def _huge(arguments):
    arguments["student_weight"][60] *= 1e4
    arguments["teacher_weight"][10] *= 1e4


def _ignored_nan(arguments):
    arguments["student_hidden"][1, 1] = arguments["teacher_hidden"][1, 1] = torch.nan


@pytest.mark.parametrize("edit", [_huge, _ignored_nan])
def test_extremes(edit):
    run_on_ranks(2, _extreme, edit)


def _count_numbers(rank, options):
    sent = {"gather": 0, "reduce": 0}
    gather, reduce = dist.all_gather, dist.all_reduce

    def counted_gather(output, tensor, **kwargs):
        sent["gather"] += tensor.numel()
        return gather(output, tensor, **kwargs)

    def counted_reduce(tensor, **kwargs):
        sent["reduce"] += tensor.numel()
        return reduce(tensor, **kwargs)

    dist.all_gather, dist.all_reduce = counted_gather, counted_reduce
    arguments, labels = inputs()
    labels = torch.where(labels < 0, 0, labels)
    begin, end = (0, 37) if rank == 0 else (37, 100)
    loss_and_gradients(
        shard(arguments, begin, end), labels, process_group=dist.group.WORLD, **options
    )
    return sent["gather"] / labels.numel(), sent["reduce"]


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, 3),
        ({"divergence": "reverse_kl", "temperature": 2.0}, 3),
        ({"alpha": 0.5}, 3 + 1),
        ({"alpha": 0.5, "temperature": 2.0}, 3 + 1 + 1),
        ({"divergence": "jsd"}, 4),
    ],
)
def test_three_numbers_per_row_cross_the_wire(options, numbers):
    hidden = 5 * 3 * 8
    assert run_on_ranks(2, _count_numbers, options) == [(numbers, hidden)] * 2


def _refused(rank, change, match):
    arguments, labels = inputs()
    begin, end = (0, 37) if rank == 0 else (37, 100)
    arguments = shard(arguments, begin, end) | {"labels": labels}
    if rank == 1:
        arguments |= change
    with pytest.raises((TypeError, ValueError), match=match[rank]):
        kdfast.linear_kd_loss(**arguments, process_group=dist.group.WORLD)
    # Nobody waits: the next call goes through.
    arguments, labels = inputs()
    kdfast.linear_kd_loss(
        labels=labels, **shard(arguments, begin, end), process_group=dist.group.WORLD
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"temperature": -1.0},
            ("rank 1 refused its arguments: ValueError: temp", "^temperature must be"),
        ),
        (
            {"student_weight": torch.zeros(63, 9)},
            ("rank 1 refused", "^student_weight must be"),
        ),
        ({"labels": torch.full((5, 3), 100)}, ("labels must be in", "labels must be in")),
        ({"labels": torch.zeros(5, 3)}, ("rank 1 refused", "^labels must be one of")),
        ({"temperature": torch.zeros(5, 3)}, ("rank 1 refused", "^temperature must be finite")),
        ({"temperature": 3.0}, ("all ranks must have the same settings",) * 2),
        (
            {
                "student_hidden": torch.zeros(4, 3, 8),
                "teacher_hidden": torch.zeros(4, 3, 12),
                "labels": None,
            },
            ("all ranks must have the same shape",) * 2,
        ),
        (
            {"student_hidden": torch.zeros(5, 3, 8, requires_grad=True)},
            ("all ranks must have the same gradients",) * 2,
        ),
        (
            {"teacher_weight": torch.zeros(64, 12), "teacher_bias": None},
            ("pass vocab_size", "pass vocab_size"),
        ),
    ],
)
def test_bad_arguments_of_one_rank_raise_on_all(change, match):
    run_on_ranks(2, _refused, change, match)


# Data parallel: every rank has a batch of its own.


class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, VOCAB)

    def forward(self, inputs, teacher_hidden, teacher_weight, **options):
        return kdfast.linear_kd_loss(
            self.body(inputs).tanh(),
            self.head.weight,
            teacher_hidden,
            teacher_weight,
            student_bias=self.head.bias,
            **options,
        )


def _step_on_the_whole_batch(wrap, rank):
    torch.manual_seed(1)
    student = Student()
    arguments, _ = inputs(bias=False)
    batch = arguments["student_hidden"][:4], arguments["teacher_hidden"][:4]
    student(*batch, arguments["teacher_weight"]).backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}

    torch.manual_seed(1)
    wrapped = wrap(Student())
    mine = slice(2 * rank, 2 * rank + 2)
    wrapped(*(x[mine] for x in batch), arguments["teacher_weight"]).backward()
    for name, parameter in wrapped.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(gradient, expected[name.removeprefix("module.")])


def _distributed_data_parallel(rank):
    _step_on_the_whole_batch(torch.nn.parallel.DistributedDataParallel, rank)


def _fully_sharded(rank):
    from torch.distributed.fsdp import fully_shard

    def wrap(student):
        # As trainers shard a model: its parts, and then the rest.
        fully_shard(student.body)
        return fully_shard(student)

    _step_on_the_whole_batch(wrap, rank)


def _sharded_weight(rank):
    """A parameter that FSDP2 holds, used outside of the module that would gather it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    arguments, labels = inputs()
    expected = loss_and_gradients(dict(arguments), labels)
    arguments, labels = inputs()
    mesh = init_device_mesh("cpu", (2,))
    for name in ("student_weight", "student_bias", "teacher_weight", "teacher_bias"):
        arguments[name] = distribute_tensor(arguments[name].detach(), mesh, [Shard(0)])
    loss, gradients = loss_and_gradients(arguments, labels)
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in gradients.items():
        gradient = gradient.full_tensor() if "hidden" not in name else gradient
        torch.testing.assert_close(gradient, expected[1][name])

    with pytest.raises(ValueError, match=r"student_weight must be this rank's shard.*to_local"):
        kdfast.linear_kd_loss(**arguments, process_group=dist.group.WORLD)
    arguments["student_hidden"] = distribute_tensor(torch.zeros(5, 3, 8), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="student_hidden must be a plain tensor, got a DTensor"):
        kdfast.linear_kd_loss(**arguments)


@pytest.mark.parametrize(
    "check", [_distributed_data_parallel, _fully_sharded, _sharded_weight], ids=lambda f: f.__name__
)
def test_data_parallel(check):
    run_on_ranks(2, check)
