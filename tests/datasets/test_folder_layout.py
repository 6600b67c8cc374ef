"""The MVTec AD layout with every quirk that people's folders have, and what is said when it is broken."""

import os
import shutil
import unicodedata

import pytest
from PIL import Image

from harness.contracts import AdgridError, Places
from harness.datasets.base import Counts
from harness.datasets.folder import DATASET, Folder
from harness.datasets.images import load_mask, read_image
from harness.contracts import Preprocessing

from .conftest import save_image, save_mask
