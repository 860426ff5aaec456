"""SmolTalk: 460,000 general conversations to fine-tune small models on (arXiv 2502.02737)."""

from jobs.data.dataset_files import REST_OF_NAME, DatasetFiles, on_hub
from jobs.tasks.conversations import ConversationFiles

CONVERSATIONS = ConversationFiles(
    DatasetFiles(
        "smoltalk",
        patterns=(rf"(data/)?train{REST_OF_NAME}",),
        expected="data/train-00000-of-00004.parquet",
        origin=on_hub("HuggingFaceTB/smol-smoltalk", "data/train*"),
    )
)
