"""What lm-evaluation-harness asks of a model, shared out among the processes of a run batch by batch."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cluscomp import ranks

Tokens = tuple[Any, list[int], list[int]]  # a request of lm-eval: its text, tokens of its context and continuation


def shared_out(kind: type) -> type:
    """A kind of lm-eval's models (HFLM or one made of it) of which each process runs its share of the batches.

    Batches are made of the requests that one process would put together, so answers are the same to the bit. All
    processes get all answers. Requests with images are not shared out: each process runs them.
    """
    if ranks.world() == 1:
        return kind
    from lm_eval.models.utils import Collator

    class Shared(kind):  # type: ignore[misc]
        """lm-eval gives requests their order and batches here as it does there, by its own `Collator`."""

        batches = 0  # so far

        def _loglikelihood_tokens(self, requests: Sequence[Tokens], *arguments: Any, **more: Any) -> list[Any]:
            """Pairs of log-likelihood and whether it is what the model would say, of each request."""
            alike: dict[tuple[int, ...], list[int]] = defaultdict(list)  # requests that one row of logits answers
            for number, (_, context, continuation) in enumerate(requests):
                alike[(*context, *continuation[:-1])].append(number)
            batches = Collator(
                [(number, context, continuation) for number, (_, context, continuation) in enumerate(requests)],
                sort_fn=lambda one: (-len(one[1] + one[2]), tuple(one[1] + one[2])),
                group_fn=lambda one: one[1] + one[2][:-1],
                group_by="contexts",
            ).get_batched(n=self.batch_size)
            rows = (one for batch in self._own(batches) for one in batch)
            own = sorted(number for _, context, end in rows for number in alike[(*context, *end[:-1])])
            found = super()._loglikelihood_tokens([requests[number] for number in own], *arguments, **more)
            return _of_all(own, found)

        def generate_until(self, requests: Sequence[Any], *arguments: Any, **more: Any) -> list[str]:
            """The model's own text after each context."""
            if not requests or len(requests[0].args) > 2:
                return super().generate_until(requests, *arguments, **more)  # type: ignore[no-any-return]
            batches = Collator(
                [(*request.args, number) for number, request in enumerate(requests)],
                sort_fn=lambda one: (-len(self.tok_encode(one[0])), one[0]),
                group_fn=lambda one: one[1],
                group_by="gen_kwargs",
            ).get_batched(n=self.batch_size)
            own = sorted(number for batch in self._own(batches) for _, _, number in batch)
            found = super().generate_until([requests[number] for number in own], *arguments, **more)
            return _of_all(own, found)

        def _own(self, batches: Iterable[Any]) -> Iterator[Any]:
            for batch in batches:
                if ranks.mine(self.batches):
                    yield batch
                self.batches += 1

    return Shared


def _of_all(own: list[int], found: list[Any]) -> list[Any]:
    """The answers to all requests in order, from those that each process has to its own."""
    every = {number: one for part in ranks.gathered(dict(zip(own, found))) for number, one in part.items()}
    return [every[number] for number in range(len(every))]
