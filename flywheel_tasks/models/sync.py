"""New weights for a running engine, as the learner's updates need them (Sec. 2.4.3).

On CPU vLLM packs every linear layer once and forgets the plain weights, and a head tied to the embedding keeps a
packed copy of its own. vLLM's reload packs the layers again but leaves that head on the old weights with no more than
a warning, so `WeightSync` packs it as well. Loading goes through the model's own `load_weights`, so fused and sharded
layers of any architecture are right.

There are two ways from a learner to the engines, and `from_device` says which. On CPU weights are one safetensors file
in shared memory (`SharedWeights`), so both are on one machine. From a GPU to others they go by vLLM's NCCL weight
transfer (`Transfer`), across machines too: its order of calls and what it announces are tested against vLLM's own
receiver on CPU, its NCCL part has not been run yet. Either way every worker of every engine answers with the checksum
of what it loaded, and the logprob probe follows.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.models import arrival
from flywheel_tasks.models.arrival import Checksum

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightSource

EXTENSION = "flywheel_tasks.models.sync.WeightSync"

_MEMORY = Path("/dev/shm")  # noqa: S108  # each file goes into a private folder

Weights = Mapping[str, Any] | Iterable[tuple[str, Any]]


class WeightSync:
    """Methods that vLLM mixes into its workers (`worker_extension_cls`)."""

    checksum: Checksum
    model_runner: Any
    device: Any
    reload_weights: Callable[..., None]

    def gpu_name(self) -> str | None:
        return gpu(self.device)

    def load_synced(self, path: str) -> str:
        """Serve the weights in `path`, a safetensors file or a folder of them, whole; gives their checksum."""
        model, checksum = self.model_runner.get_model(), Checksum()
        files = safetensors_files(Path(path))
        self._check_complete(files)
        self.reload_weights(weights_iterator=checksum.over(_tensors(files)))
        self._pack(model)
        return checksum.value()

    def begin_checksum(self) -> None:
        """From now on what goes into the model is counted: vLLM's receiver hands it over in pieces."""
        model, self.checksum = self.model_runner.get_model(), Checksum()
        plain, over = model.load_weights, self.checksum.over
        model.load_weights = lambda weights: plain(over(weights))

    def end_checksum(self) -> str:
        del self.model_runner.get_model().load_weights
        return self.checksum.value()

    def pack_tied_head(self) -> None:
        self._pack(self.model_runner.get_model())

    def _check_complete(self, files: list[Path]) -> None:
        """vLLM would leave a fused layer that gets half its weights with garbage in the other half."""
        config = self.model_runner.model_config
        wanted = set(_names(safetensors_files(Path(config.model))))
        found = set(_names(files))
        tied = {"lm_head.weight"} if config.hf_config.tie_word_embeddings else set()
        if wanted - tied != found - tied:
            missing, extra = sorted(wanted - found - tied), sorted(found - wanted - tied)
            raise InputError(f"an update must hold the whole model: missing {missing[:3]}, unknown {extra[:3]}")

    @staticmethod
    def _pack(model: Any) -> None:
        from vllm.platforms import current_platform

        head = getattr(model, "lm_head", None)
        if head is None or not current_platform.is_cpu():
            return
        if any(module is not head and getattr(module, "weight", None) is head.weight for module in model.modules()):
            head.quant_method.process_weights_after_loading(head)


class SharedWeights:
    """Weights in files of the shared memory, for engines on this machine. Only this process's hold on a file keeps it,
    so none is left over however the process ends."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def write(self, weights: Weights) -> str:
        from safetensors.torch import save_file

        pairs = weights.items() if isinstance(weights, Mapping) else weights
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in pairs}
        with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
            save_file(tensors, f"{folder}/weights.safetensors")
            file = os.open(f"{folder}/weights.safetensors", os.O_RDONLY)
        path = f"/proc/{os.getpid()}/fd/{file}"
        self._files[path] = file
        return path

    def keep_only(self, path: str) -> None:
        for other in [name for name in self._files if name != path]:
            os.close(self._files.pop(other))

    def close(self) -> None:
        self.keep_only("")


def gpu(device: Any) -> str | None:
    """A name for the GPU behind a torch device that every process on every machine gives it."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def from_device(engine_gpus: Collection[str], own: str | None) -> bool:
    """Whether weights go from device to device: a learner on a GPU, and engines on others. Elsewhere the file in shared
    memory is the way: on CPU the fastest, and on a GPU that both share (one machine, then) NCCL refuses two ranks."""
    return own is not None and len(engine_gpus) > 0 and own not in engine_gpus


class Transfer:
    """Weights from a learner's GPU to those of the engines by NCCL, without a file (vLLM's own weight transfer).

    It lives in the first learner, which is rank 0 of a group of its own with every worker of every engine; of a sharded
    policy the other learners only go through the weights along. `call` takes the name and the argument of each of the
    four calls that vLLM makes to the engines; `declare` says what `weights` will give. Between rounds alone."""

    def __init__(
        self,
        call: Callable[..., Any],
        declare: Callable[[], Iterable[tuple[str, Any, tuple[int, ...]]]],
        weights: Callable[[], Iterator[tuple[str, Any]]],
        *,
        engine_gpus: int,
        address: str,
    ) -> None:
        import torch

        if not torch.cuda.is_available():
            raise FlywheelError("device transfer needs a GPU in the learner too: set placement.gpus to 1")
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
        from vllm.utils.network_utils import get_open_port

        info = NCCLTrainerInitInfo(
            master_address=address, master_port=get_open_port(), world_size=1 + engine_gpus, rank=0
        )
        self._checksum, self._calls = Checksum(), Calls(call)
        self._sender = NCCLTrainerWeightTransferEngine.trainer_init(
            info, client=self._calls, source=source(declare, lambda: self._checksum.over(weights()))
        )

    def send(self) -> None:
        """vLLM packs on streams of its own, which do not wait for the one that the optimiser's step is still on."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._sender.send_weights()
        arrival.check(self._checksum.value(), self._calls.loaded)


def source(
    declare: Callable[[], Iterable[tuple[str, Any, tuple[int, ...]]]], weights: Callable[[], Iterator[tuple[str, Any]]]
) -> WeightSource:
    """What vLLM's sender reads: (name, dtype, shape) of every weight, and the weights in the same order."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Merged(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(*one) for one in declare()]

        def __iter__(self) -> Iterator[tuple[str, Any]]:
            return weights()

    return Merged()


class Calls:
    """The four calls that vLLM's sender makes to the engines, by one function that takes a name and an argument."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.loaded: list[str] = []
        """What each worker of the engines says that it loaded."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.loaded = self._call("finish_weight_update")


def safetensors_files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"no safetensors at {path}: weights come as a .safetensors file or a folder of them")
    return files


def _names(files: list[Path]) -> Iterator[str]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            yield from tensors.keys()


def _tensors(files: list[Path]) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                yield name, tensors.get_tensor(name)
