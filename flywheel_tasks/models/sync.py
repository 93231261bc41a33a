"""New weights for a running engine, as the learner's updates need them (Sec. 2.4.3).

On CPU vLLM packs every linear layer once and forgets the plain weights, and a head tied to the embedding keeps a
packed copy of its own. vLLM's reload packs the layers again but leaves that head on the old weights with no more than
a warning, so `WeightSync` packs it as well. Loading goes through the model's own `load_weights`, so fused and sharded
layers of any architecture are right.

Weights travel as one safetensors file in shared memory (`SharedWeights`), so whoever writes them is on the engines'
machine, on GPUs as on CPU: this is how the stage `rl` hands them over. `Transfer` sends them from device to device by
vLLM's NCCL weight transfer, across machines too; `rl` does not use it yet.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flywheel_tasks.core.errors import FlywheelError, InputError

if TYPE_CHECKING:
    from flywheel_tasks.models.engine import Engine

EXTENSION = "flywheel_tasks.models.sync.WeightSync"

_MEMORY = Path("/dev/shm")  # noqa: S108  # each file goes into a private folder

Weights = Mapping[str, Any] | Iterable[tuple[str, Any]]


class WeightSync:
    """Methods that vLLM mixes into its workers (`worker_extension_cls`)."""

    model_runner: Any
    reload_weights: Callable[..., None]

    def load_synced(self, path: str) -> None:
        """Serve the weights in `path`, a safetensors file or a folder of them, whole."""
        model = self.model_runner.get_model()
        files = safetensors_files(Path(path))
        self._check_complete(files)
        self.reload_weights(weights_iterator=_tensors(files))
        self._pack(model)

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


class Transfer:
    """Weights from the learner's GPU to the engines' by NCCL, without a file (vLLM's own weight transfer).

    No stage uses it yet: it drives the engines from the learner's process, and those of `rl` are behind a Ray actor.

    `engine` was opened on GPUs. One learner process, rank 0, sends, between rounds. An engine that is replaced starts
    from its file again and needs another `send`; the probe tells."""

    def __init__(self, engine: Engine, module: Any, *, address: str, port: int) -> None:
        from vllm.distributed.weight_transfer.base import ModuleSource
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        if engine.platform == "cpu":
            raise FlywheelError("NCCL needs GPUs at both ends: give an engine on CPU its weights by engine.update")
        gpus = engine.replicas * engine.tensor_parallel
        info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=1 + gpus, rank=0)
        self._trainer = NCCLTrainerWeightTransferEngine.trainer_init(
            info, client=_TransferClient(engine), source=ModuleSource(module)
        )

    def send(self) -> None:
        self._trainer.send_weights()


class _TransferClient:
    """The four calls vLLM's sender makes to the engines."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._engine.transfer("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._engine.transfer("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._engine.transfer("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._engine.transfer("finish_weight_update")


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
