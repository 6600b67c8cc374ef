"""Datasets: one file per published on-disk layout, plus what they share.

A layout file ends with `DATASET = ItsClass` and is found by its file name. The other files hold what the layouts
share: `base` (roots, categories, pairs), `checks` (found against published), `files` (listing and opening), `images`
(pixels) and `fingerprint` (content hashes and the k-shot draw).
"""
