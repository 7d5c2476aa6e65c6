"""`python -P common/kaggle/asked.py submissions|files SLUG` prints, as JSON, what the kaggle program does not print.

Importing the kaggle library prints text and creates folders, so the kit's own process never imports it.
"""

import json
import sys

PAGE, FILES_PAGE = 100, 200  # the largest page sizes that Kaggle allows
COLUMNS = {"ref": "ref", "file": "file_name", "message": "description", "public": "public_score"}
COLUMNS |= {"private": "private_score", "reason": "error_description"}


def files(api, slug: str) -> dict[str, int]:
    """Names and sizes in bytes of the competition's files; image sets fill hundreds of pages."""
    sizes, token = {}, None
    while token != "":
        found = api.competition_list_files(slug, page_token=token, page_size=FILES_PAGE)
        sizes |= {file.name: file.total_bytes for file in found.files}
        token = found.next_page_token or ""
    return sizes


def submissions(api, slug: str) -> dict:
    """All submissions of the account, newest first, as rows of the ledger, and how many are left today."""
    rows, found = [], range(PAGE)
    while len(found) == PAGE:
        found = api.competition_submissions(slug, page_number=len(rows) // PAGE + 1, page_size=PAGE) or []
        for row in found:
            told = {column: " ".join(str(getattr(row, name) or "").split()) for column, name in COLUMNS.items()}
            rows.append(told | {"time": row.date.isoformat() if row.date else "", "status": row.status.name})
    try:
        left = api.competition_get_submission_limits(slug).num_allowed_now
    except Exception as error:  # a submission may still be possible, so the number is shown as unknown
        print(f"submission limits: {error}", file=sys.stderr)
        left = None
    return {"submissions": rows, "left": left}


def main(what: str, slug: str) -> str | None:
    """Print the answer; if there is none, return the reason as one line, which `sys.exit` prints on stderr."""
    from kaggle import api

    try:
        if not api._authenticated:  # try again to get the reason: without a network no token is accepted either
            api.authenticate()
        print(json.dumps({"files": files, "submissions": submissions}[what](api, slug)))
        return None
    except SystemExit:
        return "401 Authentication required"
    except Exception as error:  # the kit explains any error
        status = getattr(getattr(error, "response", None), "status_code", None)
        return f"{f'({status}) ' if status else ''}{type(error).__name__}: {error}".replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
