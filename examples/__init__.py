# Imported before torch and torchao: what they would print, and what Ctrl-C does meanwhile, is settled here.
from custom_components.runtime.starting import start_module

start_module()
