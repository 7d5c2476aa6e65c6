"""Where a competition's files come from and where its submissions go: facts that only the competition knows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Images:
    """Training images that are not on Kaggle: every id has its own address."""

    url: str  # with {id} for the id
    ids_file: str  # the CSV among the competition's files that names the images
    ids_column: str
    folder: str  # where the images go, below the data
    total: str  # their number and size, shown to the user


@dataclass(frozen=True)
class Source:
    """The `SOURCE` of a competition's config.py: what `make data`, `submit`, `board`, `kernel` and `notebook` need."""

    slug: str  # the competition's name on Kaggle; "" when it is not there
    expected: tuple[str, ...]  # files that complete data must have: names, or patterns like "train_images/*.jpg"
    higher_is_better: bool
    sample_submission: str = "sample_submission.csv"  # or a pattern, if every stage has its own
    labels: tuple[str, ...] = ()  # the files that --labels-only fetches
    images: Images | None = None
    url: str = ""  # address of an archive, for data that is not on Kaggle
    checksum: str = ""  # of that archive, as md5:... or sha256:...
    checksum_url: str = ""  # record that publishes the checksum (JSON like zenodo.org's), used if `checksum` is empty
    nowhere_to_submit: str = ""  # the reason why no submission is possible; "" if it is possible
    notes: str = ""  # what the user should know before downloading

    @property
    def page(self) -> str:
        return f"https://www.kaggle.com/c/{self.slug}"
