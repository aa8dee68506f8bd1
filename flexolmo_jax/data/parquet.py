"""Rows of Parquet files, through pyarrow."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from flexolmo_jax.data.readers import Bad, Row, check_columns

ROWS = 256  # decoded at a time


def rows(
    file: Path, text_field: str, group_field: str, others: Sequence[str] = ()
) -> Iterator[tuple[int, Row]]:
    """Every row of a file, numbered from 1; arguments and errors as `readers.read_rows`."""
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except Exception as error:
        raise ValueError(f"{file}: not a readable Parquet file ({error})") from error
    with table:
        names = table.schema_arrow.names
        check_columns(file, names, text_field, group_field)
        columns = [text_field] + [group_field] * (group_field in names)
        columns += [name for name in others if names.count(name) == 1 and name not in columns]
        kind = table.schema_arrow.field(text_field).type
        if not (_holds_text(kind) or pyarrow.types.is_null(kind)):
            raise ValueError(
                f"{file}: expected the column {text_field!r} to be text, found {kind}; name "
                "another one as the text field"
            )
        number = last = 0
        for group in range(table.num_row_groups):
            last += table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(ROWS, row_groups=[group], columns=columns):
                    values = [_values(batch.column(name)) for name in columns]
                    for row in zip(*values, strict=True):
                        number += 1
                        yield number, dict(zip(columns, row, strict=True))
            except (OSError, pyarrow.ArrowException) as error:
                yield number + 1, Bad(f"up to row {last}, the file cannot be read ({error})")
                number = last


def _holds_text(kind: pyarrow.DataType) -> bool:
    """Whether a column's values are strings, or bytes that may be UTF-8."""
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _values(column: pyarrow.Array) -> list[Any]:
    """The values of a column; strings as bytes: one that is not UTF-8 must not spoil the rest."""
    if _holds_text(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()
