"""Types of stored numbers: a unit in the field's name and a range here, so that nonsense is refused on reading.

The bounds are far from anything that exists; what a machine can do at most is asked in `bounds`.
"""

from typing import Annotated

from pydantic import Field

Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Index = Annotated[int, Field(ge=0, le=1 << 20)]
Seconds = Annotated[float, Field(ge=0, le=1e7)]
Elapsed = Annotated[float, Field(gt=0, le=1e7)]
"""Seconds of something that took place."""
Cpus = Annotated[int, Field(ge=1, le=1 << 16)]
Bits = Annotated[int, Field(ge=0, lt=1 << 64)]
Step = Annotated[float, Field(ge=-1e10, le=1e10)]
"""Seconds by which a clock was moved, either way."""
Joules = Annotated[float, Field(ge=0, le=1e12)]
Watts = Annotated[float, Field(ge=0, le=1e5)]
Megahertz = Annotated[int, Field(ge=0, le=100_000)]
BytesPerS = Annotated[float, Field(gt=0, le=1e15)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(max_length=1000)]
