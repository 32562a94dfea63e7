"""The app that MONAI Label starts; it takes the subclass of MONAILabelApp that it finds in this file.

python -m monailabel.main start_server --app "$(python -m monai_unlearn path label_app)" --studies DIR
"""

from monai_unlearn.label.app import UnlearningApp

__all__ = ["UnlearningApp"]
