"""Types of stored numbers, each with a range, so that impossible values are refused on reading.

The field's name carries the unit. The ranges are far wider than anything that exists; `bounds` holds the limits of a
machine.
"""

from typing import Annotated

from pydantic import Field

Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Index = Annotated[int, Field(ge=0, le=1 << 20)]
Seconds = Annotated[float, Field(ge=0, le=1e7)]
Elapsed = Annotated[float, Field(gt=0, le=1e7)]
"""Duration of something that happened, so above zero."""
Cpus = Annotated[int, Field(ge=1, le=1 << 16)]
Bits = Annotated[int, Field(ge=0, lt=1 << 64)]
Step = Annotated[float, Field(ge=-1e10, le=1e10)]
"""Seconds by which a clock was set forward or back."""
Joules = Annotated[float, Field(ge=0, le=1e12)]
Watts = Annotated[float, Field(ge=0, le=1e5)]
Megahertz = Annotated[int, Field(ge=0, le=100_000)]
BytesPerS = Annotated[float, Field(gt=0, le=1e15)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(max_length=1000)]
