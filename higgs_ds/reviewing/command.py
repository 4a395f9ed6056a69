"""launch/review.py: check the clips of a list by ear, on a page that this machine serves."""

from __future__ import annotations

import signal

from higgs_ds.common.console import say
from higgs_ds.common.errors import InputError
from higgs_ds.common.interrupts import Interrupted
from higgs_ds.common.words import counted
from higgs_ds.options.reviewing import ReviewOptions, check_review_options
from higgs_ds.reviewing.review_list import ReviewList, opened_list
from higgs_ds.reviewing.server import ReviewServer


def main(options: ReviewOptions) -> None:
    """Serve the page of a list until Ctrl-C. Raises InputError."""
    problems = check_review_options(options)
    if problems:
        raise InputError(problems)
    with opened_list(options.path, options.format) as review, _server(review, options) as server:
        rows = counted(len(review.rows), review.form.noun)
        say(f"{review.path}: {rows}, {review.num_dropped():,} of them dropped")
        say(f"Open {server.url} in a browser{' on this machine' if server.is_local() else ''}. Ctrl-C ends the review.")
        try:
            server.serve_forever()
        except KeyboardInterrupt as error:
            if isinstance(error, Interrupted) and error.number != signal.SIGINT:
                raise
        finally:
            review.writing.acquire()  # a change that is being written is completed, and is the last one
        dropped = f"{review.num_dropped():,} of {rows} dropped"
        say(f"{review.path}: {dropped}; every change is written")


def _server(review: ReviewList, options: ReviewOptions) -> ReviewServer:
    try:
        return ReviewServer(review, options.host, options.port)
    except OSError as error:
        raise InputError(
            f"--host {options.host} --port {options.port}: cannot be served there: {error.strerror or error}; choose "
            "another port, or leave it out"
        ) from error
