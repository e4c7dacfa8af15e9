"""Generated documents with questions: the training data of the reference model and the source of the bundled splits."""

from tasks.documents.document import Document, Turn
from tasks.documents.kinds import KINDS, STYLES
from tasks.documents.pools import Pool, split_of
from tasks.documents.prose import prose, prose_hash, sentences

__all__ = ["KINDS", "STYLES", "Document", "Pool", "Turn", "prose", "prose_hash", "sentences", "split_of"]
