"""`generate_batch`, and the other ways in which Transformers' models offer continuous batching."""

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm
from transformers.generation import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from .continuous_batching import ContinuousBatchingManager
from .request_output import RequestOutput


class ContinuousBatchingMixin:
    """Transformers' three ways to continuous batching, over this package's engine."""

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints=None,
    ) -> ContinuousBatchingManager:
        """A manager that takes requests at any time, once it is started.

        Args:
            generation_config (`GenerationConfig`, *optional*): settings of all requests.
            continuous_batching_config (`ContinuousBatchingConfig`, *optional*): see [`ContinuousBatchingManager`].
            workload_hints: not needed.
        """
        cached = getattr(self, "_cached_continuous_batching_manager", None)
        if cached is not None:
            return cached
        return ContinuousBatchingManager(self, generation_config, continuous_batching_config)

    def destroy_cached_continuous_batching_manager(self):
        """Ends the manager that a session has left for the next."""
        cached = self.__dict__.pop("_cached_continuous_batching_manager", None)
        if cached is not None:
            cached.destroy()

    @contextmanager
    def continuous_batching_context_manager(
        self,
        generation_config: GenerationConfig | None = None,
        block: bool = True,
        timeout: float | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        persistent_manager: bool = False,
        warmup: bool = True,
        workload_hints=None,
    ) -> Iterator[ContinuousBatchingManager]:
        """A manager that is started, and at the end of the `with` writes what is in line and stops."""
        manager = self.init_continuous_batching(generation_config, continuous_batching_config)
        manager.start()
        try:
            yield manager
        finally:
            manager.stop(block=block, timeout=timeout, keep_for_next_session=persistent_manager)
            if not persistent_manager and not manager.is_running():
                manager.destroy()

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        **settings,
    ) -> dict[str, RequestOutput]:
        """Writes many prompts, in rows that are free for the next as soon as a text is done.

        Args:
            inputs (`list[list[int]]`): prompts as token ids, without padding.
            generation_config, continuous_batching_config: as in `init_continuous_batching`.
            record_timestamps (`bool`): see [`ContinuousBatchingManager.add_request`].
            progress_bar (`bool`): whether to show one.
            settings: fields of [`MaskedDiffusionGenerationConfig`] and arguments of `add_request`. With a `seed`, the
                first prompt has it, the second `seed + 1`, and so on, as in `generate`.

        Returns:
            `dict[str, RequestOutput]`: by request id, in the order of `inputs`, further samples of a prompt before
            its own id. A request that failed has an `error`; the others are not touched by it.

        Raises:
            ValueError: if an argument is bad, before the first pass.
        """
        if not inputs:
            return {}
        manager = ContinuousBatchingManager(self, generation_config, continuous_batching_config)
        count, seed = settings.get("num_return_sequences") or manager.num_return_sequences, settings.pop("seed", None)
        for index, input_ids in enumerate(inputs):
            own = {} if seed is None else {"seed": seed + index * count}
            manager.add_request(input_ids, record_timestamps=record_timestamps, **settings, **own)
        order = list(manager._tickets)
        try:
            with tqdm(total=len(order), disable=not progress_bar, unit="request") as bar:
                manager.run(lambda: bar.update(len(manager._results) - bar.n))
        finally:
            manager.destroy()
        results = {output.request_id: output for output in manager._results}
        return {request_id: results[request_id] for request_id in order}
