"""What a key may look like, so that every store holds it under the same name.

The alphabet is the part that S3, GCS, Azure and a POSIX directory store unescaped; a part is short
enough for any file system.
"""

import re

from shoal_cluster.domain.errors import InvalidRequest

KEY_LENGTH_MAX = 800
"""S3, GCS and Azure allow 1,024 bytes; 224 stay for the prefix in the bucket's URL."""

PART_LENGTH_MAX = 200
"""File names end at 255 bytes on every file system we know."""

_PART = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*")


def check_key(key: str) -> None:
    """Refuses a key that some store would rename, hide or place outside its root.

    A part never starts with '.': such names are the stores' own (temporary files).

    Raises: InvalidRequest naming the key (nothing was applied).
    """
    if not key or len(key) > KEY_LENGTH_MAX:
        raise InvalidRequest(
            f"key {key[:80]!r} is {len(key)} characters long",
            field="key",
            limit=f"1 to {KEY_LENGTH_MAX} characters",
        )
    for part in key.split("/"):
        if len(part) > PART_LENGTH_MAX or not _PART.fullmatch(part):
            raise InvalidRequest(
                f"key {key[:80]!r} has the part {part[:80]!r}",
                field="key",
                limit=f"parts of 1 to {PART_LENGTH_MAX} characters of [A-Za-z0-9._=-], "
                "not starting with '.'",
            )


def check_prefix(prefix: str) -> None:
    """Refuses a prefix that is neither '' nor a key followed by '/'.

    Raises: InvalidRequest naming the prefix (nothing was applied).
    """
    if not prefix:
        return
    if not prefix.endswith("/"):
        raise InvalidRequest(f"prefix {prefix[:80]!r} must end in '/'", field="prefix")
    check_key(prefix[:-1])
