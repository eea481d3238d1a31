"""Files and folders that appear whole or not at all, their checksums, and locks."""

from __future__ import annotations

from dti_model.files.checked import (
    CHECKSUMS_FILE,
    DamagedFileError,
    are_checksums,
    check_checksums,
    check_files,
    check_nothing_added,
    checksums,
    opened,
    read_checksums,
    read_file,
    read_sealed,
    sha256_of,
    sha256_of_json,
    without_nan,
    write_checksums,
    write_json,
    write_sealed,
)
from dti_model.files.locks import LockedError, locked, locked_beside
from dti_model.files.whole import (
    WriteError,
    is_passing,
    is_temporary,
    remove_folder,
    remove_leftovers,
    remove_tree,
    temporary_folder,
    whole_file,
    whole_folder,
)
