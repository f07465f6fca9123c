"""Selects a running cluster; the options of `memserve status`, `role` and `drain` come from this class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
from cyclopts import Parameter

if TYPE_CHECKING:
    from memserve.commands.status import Target


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class ClusterOptions:
    """A cluster given by its address, or the one that runs from this directory."""

    url: Annotated[
        str | None,
        Parameter(
            help="The cluster's address, such as http://127.0.0.1:8080; without it, the one that runs from this directory."
        ),
    ] = None
    api_key: Annotated[
        str | None,
        Parameter(
            env_var="MEMSERVE_API_KEY", help="One of the keys in [frontend] api_keys, if there are any."
        ),
    ] = None
    log_dir: Annotated[
        Path, Parameter(help="The [logging] dir of the cluster to find when no --url is given.")
    ] = Path("logs")

    def target(self) -> Target:
        """The cluster itself. Raises UserError when there is none."""
        from memserve.commands.status import Target

        return Target.find(self.url, self.api_key, self.log_dir)
