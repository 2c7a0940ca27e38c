# SPDX-License-Identifier: Apache-2.0
"""Which values of a token are compared."""

SAMPLE = 9
"""Every ninth: coprime with the patch sides in use (14, 16), so the samples of a patch lie in all rows and columns."""
