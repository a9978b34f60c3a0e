"""The parts that the recipes put together: one responsibility a file, usable from torchtune's own recipes as well."""

import logging

# torchao 0.15 warns that its C++ extensions do not fit newer versions of torch; nothing here uses them.
logging.getLogger("torchao").setLevel(logging.ERROR)
