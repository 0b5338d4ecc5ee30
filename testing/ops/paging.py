"""Paged caches for tests: shuffled pages with gaps between them, as in vLLM, and poison in every unwritten byte."""

from __future__ import annotations

import builtins
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_deepseek_v4flash.ops.rows import PagedRows, RowFormat

from . import codecs

# NaN as e4m3, ue8m0, bf16, fp16 and fp32.
POISON = 0xFF


@dataclass
class TestCache:
    """A cache on a device together with the arithmetic of its addresses, byte by byte."""

    __test__ = False  # not a test class

    storage: torch.Tensor
    """[P, stride] of the format's dtype: the pages and the gaps between them."""
    rows: PagedRows

    @property
    def bytes(self) -> torch.Tensor:
        """[P, stride bytes] uint8 on the CPU, a copy."""
        return self.storage.cpu().view(torch.uint8).clone()

    def spans(self, page: int, row: int) -> tuple[slice, slice]:
        """The byte ranges of a row's data and of its scales within a page's bytes."""
        fmt, count = self.rows.format, self.rows.rows_per_page
        data, scales = codecs.data_bytes(fmt), codecs.scale_bytes(fmt)
        return slice(row * data, (row + 1) * data), slice(
            count * data + row * scales, count * data + (row + 1) * scales
        )

    def place(self, request: int, row: int) -> tuple[int, int]:
        """Page and row within it of row number `row` of a request."""
        pages, count = self.rows.block_table[request], self.rows.rows_per_page
        return int(pages[row // count]), row % count

    def slot(self, request: int, row: int) -> int:
        page, offset = self.place(request, row)
        return page * self.rows.rows_per_page + offset

    def put_bytes(self, page: int, row: int, data: builtins.bytes, scales: builtins.bytes = b"") -> None:
        image = self.bytes
        for span, content in zip(self.spans(page, row), (data, scales), strict=True):
            image[page, span] = torch.tensor(list(content), dtype=torch.uint8)
        self.storage.copy_(image.view(self.storage.dtype))

    def put(self, request: int, values: torch.Tensor) -> torch.Tensor:
        """Store rows 0.. of a request from [N, dim]; returns what the bytes mean, [N, dim] fp64."""
        image, fmt, stored = self.bytes, self.rows.format, []
        for number, row in enumerate(values.double().tolist()):
            data, scales = codecs.encode(row, fmt)
            page, offset = self.place(request, number)
            for span, content in zip(self.spans(page, offset), (data, scales), strict=True):
                image[page, span] = torch.tensor(list(content), dtype=torch.uint8)
            stored.append(codecs.decode(data, scales, fmt))
        self.storage.copy_(image.view(self.storage.dtype))
        return torch.tensor(stored, dtype=torch.float64).reshape(-1, fmt.dim)

    def poison(self, request: int, row: int) -> None:
        page, offset = self.place(request, row)
        data, scales = (bytes([POISON] * (span.stop - span.start)) for span in self.spans(page, offset))
        self.put_bytes(page, offset, data, scales)

    def raw(self, request: int, row: int) -> tuple[builtins.bytes, builtins.bytes]:
        page, offset = self.place(request, row)
        image = self.bytes[page].numpy()
        data, scales = (image[span].tobytes() for span in self.spans(page, offset))
        return data, scales

    def get(self, request: int, row: int) -> torch.Tensor:
        """A row as [dim] fp64."""
        return torch.tensor(codecs.decode(*self.raw(request, row), self.rows.format), dtype=torch.float64)

    def is_poison(self, request: int, row: int) -> bool:
        return all(set(part) <= {POISON} for part in self.raw(request, row))


def make_cache(
    fmt: RowFormat,
    rows_per_page: int,
    lengths: Sequence[int],
    rng: torch.Generator,
    device: torch.device,
    *,
    far: bool = False,
) -> TestCache:
    """A poisoned cache for requests of these lengths (in rows), on shuffled pages; page 0 belongs to no request.

    With `far` every page of a request lies past 2^31 elements, where a 32-bit offset would miss it. On a CPU that
    takes no memory; on a GPU it does, 2^28 elements a page.
    """
    counts = [-(-length // rows_per_page) for length in lengths]
    first = FAR_PAGES if far else 1
    order = (torch.randperm(sum(counts) + 1, generator=rng) + first).tolist()  # one page stays unused
    # Entries past a request's own pages are another's or the null page, as in vLLM; no op may follow them.
    table = torch.zeros((len(lengths), max([*counts, 1]) + 1), dtype=torch.int32)
    for request, count in enumerate(counts):
        for i in range(count):
            table[request, i] = order.pop()
    page = rows_per_page * (codecs.data_bytes(fmt) + codecs.scale_bytes(fmt))
    # Pages of several layers alternate in one allocation; each starts at a multiple of 16 bytes.
    stride = -(-page // 16) * 16 * 2
    shape = (sum(counts) + first + 1, stride // fmt.dtype.itemsize)
    storage = _sparse(shape, fmt.dtype, device) if far else torch.empty(shape, dtype=fmt.dtype, device=device)
    storage.copy_(torch.full((shape[0], stride), POISON, dtype=torch.uint8).view(fmt.dtype))
    pages = storage[:, : page // fmt.dtype.itemsize]
    return TestCache(storage, PagedRows(pages, rows_per_page, fmt, table.to(device)))


# A page every 2^28 elements: the pages from this one on lie past 2^31.
FAR_STRIDE, FAR_PAGES = 1 << 28, 9


def _sparse(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows of `shape` with a stride of FAR_STRIDE; on a CPU in a sparse file.

    There 2^31 elements lie before them too, so that an offset that wraps around meets zeros, not a segmentation fault.
    """
    before, size = (1 << 31 if device.type == "cpu" else 0), shape[0] * FAR_STRIDE
    if device.type == "cpu":
        with tempfile.NamedTemporaryFile() as file:
            file.truncate((before + size) * dtype.itemsize)
            # The mapping outlives the file's name.
            memory = torch.from_file(file.name, shared=True, size=before + size, dtype=dtype)
    else:
        memory = torch.empty(size, dtype=dtype, device=device)
    return memory.as_strided(shape, (FAR_STRIDE, 1), before)
