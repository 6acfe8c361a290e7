"""Interprets the opcodes of a pickle with placeholders: nothing that it names is imported, built or called.

Dictionaries keep only entries whose keys are strings or numbers: nothing else is ever hashed.
"""
from __future__ import annotations

import io
import pickletools
from typing import Any, NamedTuple

import torch

OPCODES = 2**20    # most of a pickle: Stable Diffusion XL with averages takes a tenth
NAME = 200         # most characters of a name
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
KINDS = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
         "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
         "ComplexFloat": "complex64", "ComplexDouble": "complex128"}
STORAGES = {"torch.storage.UntypedStorage": torch.uint8,
            **{f"torch.{k}Storage": DTYPES[f"torch.{d}"] for k, d in KINDS.items()}}


class Name(NamedTuple):
    """A name in a file: module and attribute."""

    path: str


class Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    count: int                  # of numbers


class Tensor(NamedTuple):
    """A tensor as the file describes it, not checked yet."""

    storage: Any
    dtype: Any
    offset: Any
    shape: Any
    stride: Any


class Object:
    """Placeholder for any other object that a file would build, with the state that it would be given."""

    state: Any = None


_CONSTANTS = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list,
              "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": Object}
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
           "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
           "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
# The number of values that an opcode takes off the stack; those that take all above the last mark.
_TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "STACK_GLOBAL": 2, "REDUCE": 2,
          "NEWOBJ": 2, "NEWOBJ_EX": 3, "BINPERSID": 1, "POP": 1, "BUILD": 1}
_MARKED = {"TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS", "ADDITEMS", "FROZENSET", "POP_MARK", "INST", "OBJ"}


def followed(stream: io.BytesIO, names: set[str], storages: dict[str, Storage]) -> Any:
    """Returns what a pickle would build, from placeholders; adds its names to `names`, its storages to
    `storages`."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for n, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        op = opcode.name
        if n > OPCODES:
            raise ValueError(f"a pickle of more than {OPCODES:,} opcodes")
        first = marks.pop() if op in _MARKED else len(stack) - _TAKEN.get(op, 0)
        if first < 0:
            raise ValueError(f"nothing for {op} to take")
        taken = stack[first:]
        del stack[first:]
        if op == "STOP":
            return stack.pop()
        if op == "MARK":
            marks.append(len(stack))
        elif op in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if op == "MEMOIZE" else arg] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET", "DUP"):
            stack.append(stack[-1] if op == "DUP" else memo[arg])
        elif op in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"):
            _fill(stack[-1], op, taken)
        elif op not in ("PROTO", "FRAME", "POP", "POP_MARK", "ADDITEMS"):
            stack.append(_pushed(op, arg, taken, names, storages))
    raise ValueError("it does not end")


def _fill(value: Any, op: str, taken: list[Any]) -> None:
    """Gives a list its items, a dictionary its entries, a placeholder its state; others keep none."""
    if op == "BUILD":
        if type(value) is Object:
            value.state = taken[0]
    elif type(value) is list:
        value.extend(taken)
    elif type(value) is dict:
        value.update(_entries(taken))


def _pushed(op: str, arg: Any, taken: list[Any], names: set[str], storages: dict[str, Storage]) -> Any:
    """The value that an opcode puts on the stack."""
    if op in _VALUES:
        # of megabytes, which would be hashed as a key
        return Object() if type(arg) is int and arg.bit_length() > 128 else arg
    if op in _CONSTANTS:
        return _CONSTANTS[op]()
    if op.startswith("TUPLE") or op == "LIST":
        return taken if op == "LIST" else tuple(taken)
    if op == "DICT":
        return _entries(taken)
    if op in ("GLOBAL", "STACK_GLOBAL", "INST"):
        module, name = taken if op == "STACK_GLOBAL" else arg.split(" ", 1)
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        names.add(path := f"{_PYTHON_2.get(module, module)[:NAME]}.{name[:NAME]}"[:NAME])
        return Object() if op == "INST" else Name(path)
    if op in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
        return _built(*taken[:2])
    if op == "BINPERSID":
        storage = _storage(taken[0])
        return storages.setdefault(storage.key, storage)
    if op in ("OBJ", "FROZENSET"):
        return Object()
    raise ValueError(f"the opcode {op}, which no checkpoint has")


def _entries(items: list[Any]) -> dict[str | int, Any]:
    """The entries of a dictionary that are kept: hashing another key may never end."""
    return {k: v for k, v in zip(items[::2], items[1::2])
            if type(k) is str or (type(k) is int and abs(k) < 2**63)}


def _storage(identifier: Any) -> Storage:
    """The storage of a persistent id: ("storage", type, key, device, count of numbers, ...). Raises
    ValueError."""
    valid = type(identifier) is tuple and len(identifier) >= 5 and identifier[0] == "storage"
    if not valid or identifier[5:] not in ((), (None,)):
        raise ValueError("a persistent id that is no storage")
    _, kind, key, _, count = identifier[:5]
    if type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("a storage without a key or a size")
    return Storage(STORAGES[kind.path.replace("torch.cuda.", "torch.")], key, count)


def _built(function: Any, args: Any) -> Any:
    """The result of a call, where it is needed: dictionaries, tensors, parameters."""
    path = function.path if isinstance(function, Name) else ""
    if path == "torch._tensor._rebuild_from_type_v2" and len(args) > 2 and isinstance(args[0], Name):
        path, args = args[0].path, args[2]
    if path in ("collections.OrderedDict", "builtins.dict"):
        pairs = args[0] if args and type(args[0]) is list else []
        entries = _entries([x for pair in pairs for x in pair[:2]])
        pairs.clear()   # a file may refer to the same ones a million times
        return entries
    if path == "torch.Size" and len(args) == 1:
        return args[0]
    if path.startswith("torch._utils._rebuild_parameter") and args:
        return args[0]
    if path in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2") and not any(args[6:7]):
        return Tensor(args[0], args[0].dtype, *args[1:4])
    if path == "torch._utils._rebuild_tensor_v3":
        return Tensor(args[0], DTYPES[args[6].path], *args[1:4])
    return Object()
