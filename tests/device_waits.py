"""Counts how often a program waits for the device, on a machine without one.

Whatever is computed from a model's weights counts as on the device. Reading its numbers on the host is a wait: `item`,
`tolist`, a copy to the CPU, and the operations whose shapes depend on values.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten
_VALUES = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.repeat_interleave.Tensor,
    _aten._unique2.default,
}
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}
_METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}


class DeviceWaits(TorchDispatchMode):
    """A context manager; `count` is the number of waits. Weights of `model` are on the device."""

    def __init__(self, model):
        super().__init__()
        self.count, self.on_device = 0, WeakIdKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self.on_device[tensor] = True
        self.methods = _Methods(self)

    def __enter__(self):
        self.methods.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.methods.__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_on_device = any(tensor in self.on_device for tensor in inputs)
        if is_on_device and self._is_wait(function, args, kwargs):
            self.count += 1
            is_on_device = False
        output = function(*args, **kwargs)
        if is_on_device:
            schema = function._schema.arguments
            written = [arg for arg, info in zip(args, schema) if info.alias_info and info.alias_info.is_write]
            for leaf in tree_leaves((output, written)):
                if isinstance(leaf, torch.Tensor):
                    self.on_device[leaf] = True
        return output

    def _is_wait(self, function, args, kwargs) -> bool:
        if function in _INDEXING:
            return any(i is not None and i.dtype == torch.bool and i in self.on_device for i in args[1])
        return function in _VALUES


class _Methods(TorchFunctionMode):
    """Methods that a tensor on the CPU answers without dispatching; and a copy to "cpu", the host by its name."""

    def __init__(self, waits: DeviceWaits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        on_device = self.waits.on_device
        is_read = function in _METHODS or (function is torch.Tensor.to and "cpu" in args[1:])
        is_read = is_read and args[0] in on_device
        self.waits.count += is_read
        output = function(*args, **(kwargs or {}))
        if is_read and isinstance(output, torch.Tensor) and output is not args[0]:
            on_device.pop(output, None)
        return output
