"""Which samples of the checked manifests are for training, and which are for validation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from higgs_ds.common.errors import InputError
from higgs_ds.common.words import counted
from higgs_ds.data.coder import Coder
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.formats.checks import printable
from higgs_ds.data.index import Index
from higgs_ds.data.joined_index import AnyIndex, JoinedIndex, consecutive, join
from higgs_ds.data.mix import mix_of
from higgs_ds.data.pairs import PairDataset
from higgs_ds.data.reference_choice import lengths_of_forms, references_of
from higgs_ds.data.sampler import split_speakers, split_validation
from higgs_ds.options.train import TrainOptions

RowsOfEach = Sequence[np.ndarray]  # of each manifest, among its own


def select(options: TrainOptions, indexes: Sequence[Index], coder: Coder) -> tuple[Dataset, Dataset, list[str]]:
    """Return the training and validation samples, and one line for each sample left out for its length.

    Args:
        indexes: of all manifests, those of the training samples first.

    Raises:
        InputError: the samples are not what the options need, or nothing is left of them.
    """
    _check_heard(options, indexes)
    data, seed = options.data, options.optim.seed
    lengths = [lengths_of_forms(index, data) for index in indexes]
    if options.objective.is_dpo:  # a pair is left out as a whole
        lengths = [np.repeat(longest_of_pairs(tokens), 2) for tokens in lengths]
    short = [np.flatnonzero(tokens <= (data.max_seq_len or np.inf)) for tokens in lengths]
    too_long = [
        f"{source}: {counted(int(tokens[row]), 'token')}"
        for index, tokens, rows in zip(indexes, lengths, short, strict=True)
        for row in np.setdiff1d(np.arange(len(index)), rows)
        for source in index.sources([row])
    ]
    of_train, of_val = _split(options, indexes, short)
    num_train = len(data.train_manifests)
    joined = join(indexes[:num_train])
    # Training has no reference from a validation sample; a speaker held out whole has no others for validation.
    train = _dataset(options, data.train_manifests, joined, indexes[:num_train], of_train, of_train, coder)
    train = replace(train, mix=mix_of([len(rows) for rows in of_train], data.mix, seed))
    if data.val_manifest is None:
        val = _dataset(options, data.train_manifests, joined, indexes, of_val, short, coder)
    else:
        of_all = indexes[num_train:]
        val = _dataset(options, data.val_manifest, join(of_all), of_all, of_val, of_val, coder)
    _check_selection(options, train, val)
    return train, val, too_long


def longest_of_pairs(tokens: np.ndarray) -> np.ndarray:
    """Return the larger number of tokens of each pair (P,), from those of its samples (2 P,)."""
    return tokens.reshape(-1, 2).max(axis=1)


def _check_heard(options: TrainOptions, indexes: Sequence[Index]) -> None:
    of_train = indexes[: len(options.data.train_manifests)]
    if options.model.whisper_conditioning and not any(index.any_heard() for index in of_train):
        raise InputError(
            "--whisper_conditioning: no sample has audio in a system or user turn, the only input of the Whisper "
            "tower; leave the option out, or put references there (--reference system, for recordings)"
        )


def _split(options: TrainOptions, indexes: Sequence[Index], short: RowsOfEach) -> tuple[RowsOfEach, RowsOfEach]:
    """Return the rows of each manifest for training, and for validation."""
    data, seed = options.data, options.optim.seed
    num_train = len(data.train_manifests)
    if data.val_manifest is not None:
        return short[:num_train], short[num_train:]
    if data.split_by == "sample":
        size = options.objective.group_size
        splits = [split_validation(rows // size, data.val_split, seed) for rows in short]
    else:
        speakers = _speakers(join(indexes))
        of_each = [speakers[rows.start :][own] for rows, own in zip(consecutive(map(len, indexes)), short, strict=True)]
        splits = split_speakers(of_each, data.val_split, seed)
        if data.val_split and not any(len(at_val) for _, at_val in splits):
            raise InputError(
                "--split_by speaker: each manifest keeps a speaker for training, so that none can be held out. Use "
                "--split_by sample or --val_manifest"
            )
    return (
        [rows[at_train] for rows, (at_train, _) in zip(short, splits, strict=True)],
        [rows[at_val] for rows, (_, at_val) in zip(short, splits, strict=True)],
    )


def _speakers(index: AnyIndex) -> np.ndarray:
    """Return the number of each sample's speaker, for a split that keeps each speaker's samples together."""
    numbers, names = index.labels("speaker")
    unnamed = int((numbers < 0).sum())
    if unnamed or len(names) < 2:
        raise InputError(
            f"--split_by speaker: {counted(unnamed, 'sample')} name{'s' if unnamed == 1 else ''} no speaker, the "
            f"others name {len(names)}; every sample must name one, and there must be two or more. Use --split_by "
            "sample or --val_manifest"
        )
    return numbers


def _dataset(
    options: TrainOptions,
    paths: Sequence[Path],
    index: AnyIndex,
    indexes: Sequence[Index],
    of_each: RowsOfEach,
    pools: RowsOfEach,
    coder: Coder,
) -> Dataset:
    """Return a selection of manifests' rows; `pools` are those whose targets may be references."""
    starts = [rows.start for rows in consecutive(map(len, indexes))]
    rows, pool = (
        np.concatenate([start + own for start, own in zip(starts, selected, strict=True)])
        for selected in (of_each, pools)
    )
    names = short_names(paths) if len(paths) > 1 else []
    manifests = dict(zip(names, consecutive(map(len, of_each)), strict=False))
    references = references_of(index, rows, pool, options.data, options.optim.seed)
    kind = PairDataset if options.objective.is_dpo else Dataset
    return kind(index, rows, coder, references, manifests)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return names that tell manifests apart: of their files or folders, with as many folders above as this takes."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    depth = 1
    while len({of_path[-depth:] for of_path in parts}) < len(parts):
        depth += 1
    return [printable(Path(*of_path[-depth:])) for of_path in parts]


def _check_selection(options: TrainOptions, train: Dataset, val: Dataset) -> None:
    for path, samples in zip(options.data.train_manifests, train.manifests.values(), strict=False):
        if not samples:
            raise InputError(
                f"--max_seq_len {options.data.max_seq_len}: every sample of {path} is longer; leave the manifest out"
            )
    if len(train) == 0:
        raise InputError(
            f"--max_seq_len {options.data.max_seq_len}: every sample is longer; nothing is left to train on"
        )
    if options.run.early_stopping_patience is not None and len(val) == 0:
        raise InputError("--early_stopping_patience: needs validation samples; give --val_manifest or --val_split")
    longest = max(train.longest, val.longest) * options.objective.group_size
    if options.optim.max_tokens_per_batch and longest > options.optim.max_tokens_per_batch:
        what = "pair" if options.objective.is_dpo else "sample"
        raise InputError(
            f"--max_tokens_per_batch {options.optim.max_tokens_per_batch}: the longest {what} has {longest} tokens; "
            "give at least that many, or leave out longer samples with --max_seq_len"
        )


def describe_manifests(train: Dataset, val: Dataset) -> list[str]:
    """Return one line for each manifest, if there are several: samples, hours, and what of them an epoch has."""
    held_out = val.manifests if val.index is train.index else {}
    lines = _describe_training(train) if train.manifests else {}
    for name, samples in val.manifests.items():
        if name in held_out:
            lines[name] += f"; {counted(len(samples), 'validation sample')}"
    described = [f"{name}: {line}" for name, line in lines.items()]
    described += [
        f"{name}: {counted(len(samples), 'validation sample')}, {_hours(val, samples):.2f} hours"
        for name, samples in val.manifests.items()
        if name not in held_out
    ]
    if isinstance(train.index, JoinedIndex) and len(repeated := train.index.repeated_rows()):
        (first,) = train.index.sources(repeated[:1])
        described.append(f"samples that an earlier manifest has too: {len(repeated):,}, for instance {first}")
    return described


def _describe_training(train: Dataset) -> dict[str, str]:
    """Return the samples of each manifest, their hours, and how many of them the first epoch has."""
    counts = train.mix.num_samples(0) if train.mix else list(map(len, train.manifests.values()))
    numbers = train.mix.numbers if train.mix else (1.0,) * len(counts)
    return {
        name: f"{counted(len(samples), 'training sample')}, {_hours(train, samples):.2f} hours; mix {number:g}: "
        f"{counted(count, 'sample')} per epoch, {count / sum(counts):.1%} of all"
        for (name, samples), number, count in zip(train.manifests.items(), numbers, counts, strict=True)
    }


def _hours(data: Dataset, samples: range) -> float:
    codec = data.coder.codec
    num_frames = data.index.num_frames()[data.rows[samples.start : samples.stop]].sum()
    return num_frames * codec.hop_length / codec.sample_rate / 3600
