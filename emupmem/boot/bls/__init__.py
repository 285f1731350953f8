# SPDX-License-Identifier: Apache-2.0
"""The Boot Loader Specification: texts, entries and sources that three loaders share."""
