"""Published weights: export them from runs, push them to the Hub, verify and pull them."""
from convnn_timm.models._weights import WeightsError
from .download import pull, verify
from .exporting import export
from .folder import ENTRY, check_folder, published_folders
from .upload import push

__all__ = ['ENTRY', 'WeightsError', 'check_folder', 'export', 'published_folders', 'pull', 'push', 'verify']
