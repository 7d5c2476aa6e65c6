"""Where a competition's files come from and where its submissions go: facts that only the competition knows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Images:
    """Training images that are not on Kaggle: one file per id at an address of its own."""

    url: str  # with {id} in it
    ids_file: str  # the CSV among the competition's files that names the images
    ids_column: str
    folder: str  # where the images go, below the data
    total: str  # how many there are and how large they are, for the user to read


@dataclass(frozen=True)
class Source:
    """The `SOURCE` of a competition's task.py: what `make data`, `submit`, `board` and `kernel` must know of it."""

    slug: str  # its name on Kaggle; "" when it is not there
    expected: tuple[str, ...]  # names, or patterns like "train_images/*.jpg", that complete data must have
    higher_is_better: bool
    sample_submission: str = "sample_submission.csv"  # or a pattern, where there is one per stage
    labels: tuple[str, ...] = ()  # the files that --labels-only fetches
    images: Images | None = None
    url: str = ""  # archive at a plain address, for data that is not on Kaggle
    checksum: str = ""  # of that archive, as md5:... or sha256:...
    checksum_url: str = ""  # record that publishes the checksum (JSON as zenodo.org gives it), when none is known here
    nowhere_to_submit: str = ""  # why no submission is possible; "" when it is
    notes: str = ""  # what the user should know before downloading

    @property
    def page(self) -> str:
        return f"https://www.kaggle.com/c/{self.slug}"
