"""The processes of one run (torchrun, srun), ranks: how they meet, share work out, and learn that one of them ended.

What they work on lies in folders that all of them see. Nothing but the run's own processes reads what they tell each
other.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cluscomp.process import INTERRUPTED, pressed, processes

Thing = TypeVar("Thing")
Made = TypeVar("Made")
LONGEST = timedelta(days=7)  # that ranks wait for one another: that one has ended is seen by other means
MOMENT = 1.0  # seconds in which the end of one rank is seen by the others
GREETING = 10.0  # seconds in which who connects has to say which rank it is
BYE, FAILED = b".", b"!"  # last words of a rank: it is done; it has failed, and said so itself
STOPS = b"?"  # before it: something stops this rank, perhaps all of them
_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]  # of what is handed on, by its number
_alone = False


def rank() -> int:
    """The number of this process among those that work together, from 0."""
    return 0 if world() == 1 else dist.get_rank()


def world() -> int:
    """How many processes work together here."""
    return 1 if _alone or not dist.is_initialized() else dist.get_world_size()


def mine(number: int) -> bool:
    """Whether the thing of this number is this process' own, where they are shared out one by one."""
    return number % world() == rank()


@contextmanager
def alone() -> Iterator[None]:
    """Work as if there were no others, which are elsewhere meanwhile."""
    global _alone  # noqa: PLW0603
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Work together with the other processes of the run, if there are any, on a device ("cpu" or "cuda").

    A rank that ends inside ends the others, and the first of them names it. All leave together.
    """
    if processes() == 1:
        yield
        return
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=LONGEST)
    watch = _Watch()
    try:
        yield
        wait()
        watch.say(BYE)
    except BaseException:
        # If it is that another rank ended, this process ends now; if all of them failed, the first alone says so.
        watch.stopping = True
        if rank() > 0:
            watch.say(STOPS)
        time.sleep(MOMENT if rank() == 0 else 2 * MOMENT)
        watch.leaving = True
        watch.say(FAILED)
        raise


def wait() -> None:
    """Go on when all have come here."""
    if world() > 1:
        dist.barrier()


def agreed(of_first: Callable[[], Thing]) -> Thing:
    """What the first process finds, for all of them; plain values."""
    if world() == 1:
        return of_first()
    found = [of_first() if rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def gathered(own: Thing) -> list[Thing]:
    """What each process has, in their order; tensors among it are on the CPU."""
    if world() == 1:
        return [own]
    found: list[Thing] = [own] * world()
    dist.all_gather_object(found, own)
    return found


def each(things: Sequence[Thing], make: Callable[[Thing], Made]) -> list[Made]:
    """What `make` makes of the things, each of which one process does; all get all, in the things' order."""
    own = {number: make(thing) for number, thing in enumerate(things) if mine(number)}
    found = {number: made for part in gathered(own) for number, made in part.items()}
    return [found[number] for number in range(len(things))]


def spread(tensor: Tensor, number: int) -> None:
    """Give all processes the numbers of a contiguous tensor that belongs to the owner of thing `number`, in place."""
    if world() > 1:
        dist.broadcast(tensor, src=number % world())


def added(own: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """The sums in float64 of what each process has, of shapes as `like`; where none has anything there is nothing."""
    if world() == 1:
        return [*own]
    has = torch.tensor([float(one is not None) for one in own])
    dist.all_reduce(has)
    found: list[Tensor | None] = []
    for one, shape, number in zip(own, like, has.tolist()):
        sums = torch.zeros_like(shape, dtype=torch.float64) if one is None else one.double()
        if number:
            dist.all_reduce(sums)
        found.append(sums if number else None)
    return found


def summed(number_: Tensor) -> Tensor:
    """The sum of a number () over all processes."""
    if world() > 1:
        dist.all_reduce(number_)
    return number_


class Chain:
    """Tensors that the owner of a thing (see `mine`) makes of those that the owner of the thing before made.

    Each is on its way at once, so that the next owner works at the first of them while others are made. They are on the
    CPU meanwhile. With one process there is nothing to hand on.
    """

    def __init__(self) -> None:
        self._sent: list[_Sent] = []

    def give(self, tensor: Tensor) -> None:
        """Hand the next tensor to the owner of the next thing, who takes it when it gets there."""
        if world() > 1:
            self._sent.append(_Sent(tensor.detach().cpu().contiguous()))

    def taken(self, like: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors that the owner of the thing before gives, each of the shape of one of `like`.

        Every one is waited for when it is asked for first. With one process they are `like`: what it has itself.
        """
        if world() == 1:
            return like
        sent, self._sent = self._sent, []
        return _Coming([(one.shape, one.device) for one in like], sent)


class _Sent:
    """A tensor on its way to the next process, which it has to be in memory for."""

    def __init__(self, tensor: Tensor) -> None:
        self._parts = [torch.tensor(_DTYPES.index(tensor.dtype)), tensor]
        self._works = [dist.isend(part, (rank() + 1) % world()) for part in self._parts]

    def wait(self) -> None:
        """Go on when it is there."""
        for work in self._works:
            assert work is not None  # this process is of the group
            work.wait()


class _Coming(Sequence[Tensor]):
    """Tensors of these shapes, on these devices, that the process before gives one after the other.

    Each was made, by the processes between, of one that this process has `sent`: that one has been taken, then.
    """

    def __init__(self, like: list[tuple[torch.Size, torch.device]], sent: list[_Sent]) -> None:
        self._like, self._sent, self._here = like, sent, list[Tensor]()

    def __len__(self) -> int:
        return len(self._like)

    def __getitem__(self, number: Any) -> Any:
        for shape, device in self._like[len(self._here) : range(len(self))[number] + 1]:
            dist.recv(kind := torch.tensor(0), source := (rank() - 1) % world())
            dist.recv(one := torch.empty(shape, dtype=_DTYPES[int(kind)]), source)
            self._here.append(one.to(device))
            if self._sent:
                self._sent.pop(0).wait()
        return self._here[number]


class _Watch:
    """A connection between the first process and each of the others: it breaks when one of them ends."""

    def __init__(self) -> None:
        host = os.environ["MASTER_ADDR"]
        server = socket.create_server((host, 0)) if rank() == 0 else None
        port = agreed(lambda: server.getsockname()[1] if server else 0)
        self._peers: dict[int, socket.socket] = {}
        self.stopping = False  # something stops this process
        self.leaving = False  # it has failed, and is about to say so
        if server is None:
            self._peers[0] = socket.create_connection((host, port))
            self._peers[0].sendall(rank().to_bytes(4))
        else:
            with server:
                while len(self._peers) < world() - 1:
                    peer, _ = server.accept()
                    number = _greeting(peer)
                    if 0 < number < world() and number not in self._peers:
                        self._peers[number] = peer
                    else:
                        peer.close()  # whoever looks for open ports, say
        for number, peer in self._peers.items():
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            threading.Thread(target=self._look, args=(number, peer), daemon=True).start()

    def say(self, word: bytes) -> None:
        """Tell the others why this process is about to end."""
        for peer in self._peers.values():
            try:
                peer.sendall(word)
            except OSError:  # it has ended itself
                continue

    def _look(self, number: int, peer: socket.socket) -> None:
        try:
            word = peer.recv(1)
            if word == STOPS:
                time.sleep(MOMENT / 2)
                if pressed() and not self.stopping:  # this rank waits for that one, where Ctrl-C does not reach Python
                    self.say(FAILED)
                    print(f"cluscomp: {INTERRUPTED}", file=sys.stderr, flush=True)
                    os._exit(130)
                word = peer.recv(1)
        except OSError:
            word = b""
        if word == BYE or self.leaving:
            return
        if not word and rank() in (0, 1):
            print(
                f"cluscomp: failed: rank {number} of {world()} ended; the same command goes on where it stopped, with "
                "any number of ranks",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        self.say(FAILED)
        os._exit(1)


def _greeting(peer: socket.socket) -> int:
    """The rank that who has connected says it is, 0 if it says none in time."""
    peer.settimeout(GREETING)
    try:
        said = peer.recv(4, socket.MSG_WAITALL)
    except OSError:
        return 0
    peer.settimeout(None)
    return int.from_bytes(said) if len(said) == 4 else 0
