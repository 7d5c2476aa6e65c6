"""`python -P common/kaggle/asked.py submissions|files SLUG`: what the kaggle program does not print, as JSON.

The kaggle library prints and makes folders when it is imported, so no process of the kit itself ever imports it.
"""

import json
import sys

PAGE, FILES_PAGE = 100, 200  # the largest ones
COLUMNS = {"ref": "ref", "file": "file_name", "message": "description", "public": "public_score"}
COLUMNS |= {"private": "private_score", "reason": "error_description"}


def files(api, slug: str) -> dict[str, int]:
    """Names and sizes of the competition's files: image sets have hundreds of pages of them."""
    sizes, token = {}, None
    while token != "":
        found = api.competition_list_files(slug, page_token=token, page_size=FILES_PAGE)
        sizes |= {file.name: file.total_bytes for file in found.files}
        token = found.next_page_token or ""
    return sizes


def submissions(api, slug: str) -> dict:
    """All submissions of the account, newest first, as columns of the ledger; and how many are left today."""
    rows, found = [], range(PAGE)
    while len(found) == PAGE:
        found = api.competition_submissions(slug, page_number=len(rows) // PAGE + 1, page_size=PAGE) or []
        for row in found:
            told = {column: " ".join(str(getattr(row, name) or "").split()) for column, name in COLUMNS.items()}
            rows.append(told | {"time": row.date.isoformat() if row.date else "", "status": row.status.name})
    try:
        left = api.competition_get_submission_limits(slug).num_allowed_now
    except Exception as error:  # whatever it is, a submission may be possible: shown as unknown
        print(f"submission limits: {error}", file=sys.stderr)
        left = None
    return {"submissions": rows, "left": left}


def main(what: str, slug: str) -> str | None:
    """Print the answer, or return why there is none, the line that `sys.exit` prints on stderr."""
    from kaggle import api

    try:
        if not api._authenticated:  # once more, for its reason: without a network a token is not known either
            api.authenticate()
        print(json.dumps({"files": files, "submissions": submissions}[what](api, slug)))
        return None
    except SystemExit:
        return "401 Authentication required"
    except Exception as error:  # the kit explains it, whatever it is
        status = getattr(getattr(error, "response", None), "status_code", None)
        return f"{f'({status}) ' if status else ''}{type(error).__name__}: {error}".replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
