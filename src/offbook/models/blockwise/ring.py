"""One sequence spread over processes, each with its share of the tokens: R processes train on R times longer ones.

Every process runs the same layers on its own tokens. In attention, keys and values travel around the ring of processes,
past the queries of each, and results merge as those of blocks do. In the backward pass they travel once more, together
with their gradients, which come home complete. Nothing else is sent, but what all must agree upon before a pass.

Source: Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from jaxtyping import Int64
from torch import Tensor, distributed, nn

from offbook.errors import ConfigError, OffbookError
from offbook.models.blockwise.spread import Share, fold


class RingError(OffbookError):
    """A process of a ring is gone, or did not answer in time."""


@dataclass(frozen=True)
class Arrival:
    """What a process comes to a forward pass with.

    Attributes:
        shape: of its input.
        settings: what must be the same in all processes, by name.
        remat: the policy that it would choose.
        seed: of dropout, if it had to choose one.
    """

    shape: tuple[int, ...]
    settings: Mapping[str, object]
    remat: str
    seed: int | None


class Ring:
    """The processes over which sequences are spread; all of them make the same calls in the same order.

    Each gives a backbone its own tokens, and the mask of the whole sequence, by whose indices masks, positions and
    dropout go. Its gradients of weights are those of its own part of the loss: so divide that by the number of targets
    in all processes, and add up the gradients before each step of the optimizer.

        hidden = net(ring.split(x), mask=Causal(), ring=ring)
        loss = linear_cross_entropy(hidden, weight, ring.split(targets), reduction="sum") / targets.numel()
        loss.backward()
        ring.sum_gradients(net)

    Args:
        group: of `torch.distributed`; None for all processes.
        timeout: seconds that a process waits for another; then both give up.

    Attributes:
        rank: this process's number in the ring.
        size: how many there are.

    Raises:
        ConfigError: `torch.distributed` is not initialised.
        RingError: a process does not come.

    Example:
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> ring = Ring()
        >>> ring.rank, ring.size, ring.indices(5).tolist()
        (0, 1, [0, 1, 2, 3, 4])
        >>> torch.distributed.destroy_process_group()
    """

    def __init__(self, group: distributed.ProcessGroup | None = None, timeout: float = 600.0) -> None:
        if not distributed.is_initialized():
            got, fix = "none", "call torch.distributed.init_process_group, in processes that torchrun starts"
            raise ConfigError("ring", expected="a group of processes", got=got, fix=fix)
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self._timeout, self._broken = timedelta(seconds=timeout), ""
        self._groups: list[distributed.ProcessGroup] = []
        # Groups of its own, for the timeout, and because it leaves them at a fault, which the others notice at once. To
        # agree needs no device.
        for backend in (None, "gloo"):
            with self._speaking("all to make a group"):
                ranks = distributed.get_process_group_ranks(group or distributed.group.WORLD)
                self._groups.append(
                    distributed.new_group(ranks, self._timeout, backend, use_local_synchronization=True)
                )

    def indices(self, tokens: int) -> Int64[Tensor, " share"]:
        """Which tokens of a sequence are this process's, in the order in which it holds them."""
        return torch.cat([torch.arange(span.start, span.stop) for span in fold(tokens, self.size, self.rank)])

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's tokens of a whole sequence: of inputs, targets or positions."""
        return x.index_select(dim, self.indices(x.shape[dim]).to(x.device))

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, such as that of their parts of the loss; without a gradient."""
        return self._add_up(value.detach().clone())

    def sum_gradients(self, *modules: nn.Module) -> None:
        """Adds up the gradients of modules' weights over all processes, in place: once for each step."""
        every = dict.fromkeys(weight for module in modules for weight in module.parameters() if weight.requires_grad)
        if not every:
            return
        # A process without tokens has none; a weight that no process used shall stay without.
        used = torch.tensor([int(weight.grad is not None) for weight in every])
        for weight, users in zip(every, self.total(used.to(next(iter(every)).device)).tolist(), strict=True):
            if users and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if weight.grad is not None:
                self._add_up(weight.grad)

    def _add_up(self, value: Tensor) -> Tensor:
        if self.size > 1:
            with self._speaking(f"all to add up {_form(value)}"):
                distributed.all_reduce(value, group=self._groups[0], async_op=True).wait(self._timeout)
        return value

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def share(self, arrive: Callable[[], Arrival], block: int, device: torch.device) -> Share:
        """Comes together for a forward pass.

        Args:
            arrive: what this process comes with; an error that it raises is raised in all processes.
            block: keys that travel at a time.
            device: of the input.

        Raises:
            ConfigError: inputs or settings do not fit those of other processes; all of them raise it.
            RingError: a process is gone or late; this ring cannot be used any more.
        """
        every = self._gathered(arrive)
        for rank, (one, first) in enumerate((one, every[0]) for one in every):
            for name, want in first.settings.items():
                if one.settings[name] != want:
                    where, fix = f"rank {rank} of the ring", "give all processes the same"
                    raise ConfigError(where, expected=f"{name} {want}, as rank 0", got=f"{one.settings[name]}", fix=fix)
        shapes = [one.shape for one in every]
        tokens = sum(shape[1] for shape in shapes)
        for rank, shape in enumerate(shapes):
            own = sum(map(len, fold(tokens, self.size, rank)))
            want = (shapes[0][0], own, *shapes[0][2:])
            if shape != want:
                where, got = f"rank {rank} of the ring", f"{shape} there, and on ranks 0 to {self.size - 1} {shapes}"
                expected, fix = f"input {want}, its share of {tokens} tokens", "cut each sequence with ring.split"
                raise ConfigError(where, expected=expected, got=got, fix=fix)
        thrifty = "layer" if any(one.remat == "layer" for one in every) else every[0].remat
        return Share(self, tokens, thrifty, every[0].seed, block, device)

    def _gathered(self, arrive: Callable[[], Arrival]) -> list[Arrival]:
        mine: Arrival | OffbookError
        try:
            mine = arrive()
        except OffbookError as error:
            mine = error
        every: list[Arrival | OffbookError] = [mine]
        if self.size > 1:
            every *= self.size
            with self._speaking("what each comes with to a forward pass"):
                distributed.all_gather_object(every, mine, group=self._groups[1])
        if isinstance(mine, OffbookError):
            raise mine
        for rank, one in enumerate(every):
            if isinstance(one, OffbookError):
                where = f"rank {rank} of the ring, {one.where}"
                raise type(one)(where, expected=one.expected, got=one.got, fix=one.fix)
        return [one for one in every if isinstance(one, Arrival)]

    def exchange(self, stacks: Sequence[list[Tensor]], number: int, tokens: int) -> Callable[[], None]:
        """Sends the tensor of a number in each stack to the next process, and puts that of the one before in its place.

        Args:
            stacks: of tensors (2, batch, heads, tokens, size).
            number: of the tensors.
            tokens: of those that come.

        Returns:
            What waits until they are there.
        """
        source, target = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        sends = [stack[number] for stack in stacks]
        for stack, old in zip(stacks, sends, strict=True):
            stack[number] = old.new_empty(*old.shape[:3], tokens, old.shape[4])
        receives = [stack[number] for stack in stacks]
        forms = [" and ".join(map(_form, some)) or "nothing" for some in (sends, receives)]
        what = f"rank {target} to take {forms[0]}, and {forms[1]} from rank {source}"
        with self._speaking(what):
            operations = [
                distributed.P2POp(act, x, group=self._groups[0], group_peer=peer)
                for act, some, peer in ((distributed.isend, sends, target), (distributed.irecv, receives, source))
                for x in some
                if x.numel()
            ]
            works = distributed.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            with self._speaking(what):
                for work in works:
                    work.wait(self._timeout)
            operations.clear()  # Until now they held what is sent.

        return wait

    @contextmanager
    def _speaking(self, expected: str) -> Iterator[None]:
        """Makes an error of `torch.distributed` one that says what was waited for."""
        where, expected = f"rank {self.rank} of the ring", f"{expected}, within {self._timeout.total_seconds():g} s"
        fix = "look for the first error in the logs of all processes, and start them again"
        if self._broken:
            raise RingError(where, expected=expected, got=f"a ring that broke before: {self._broken}", fix=fix)
        try:
            yield
        except RuntimeError as error:
            # Of what gloo and NCCL say, the sentence between the line of their source and the advice.
            self._broken = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". ")[0]
            for group in self._groups:
                group.abort()
                distributed.destroy_process_group(group)
            self._groups.clear()
            raise RingError(where, expected=expected, got=self._broken, fix=fix) from error


def _form(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
