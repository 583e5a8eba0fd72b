// docs/api.md says what the API has: every path, method, member and code, and no other; its examples are requests that are taken.

package api

import (
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

func TestDocs_DescribeTheAPI(t *testing.T) {
	page, err := os.ReadFile("../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := make(map[string]string)
	for s := range strings.SplitSeq(string(page), "\n## ") {
		title, text, _ := strings.Cut(s, "\n")
		sections[strings.Trim(title, "`")] = text
	}
	h := Handler(&fakeBackend{config: []byte("{}")})
	ask := func(method, path, body string, header http.Header) *httptest.ResponseRecorder {
		r := httptest.NewRequest(method, path, strings.NewReader(body))
		r.Header = header
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w
	}
	for _, path := range []string{PathStatus, PathAttachments, PathAttachments + "/{name}", PathAttachments + "/{name}/names", PathAttachments + "/{name}/ports", PathAddresses, PathAddresses + "/{addr}", PathPeers, PathConfig} {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete} {
			_, described := sections[method+" "+path]
			if has := ask(method, strings.NewReplacer("{name}", "web", "{addr}", "10.213.7.9").Replace(path), "", nil).Code != http.StatusMethodNotAllowed; has != described {
				t.Errorf("%s %s: the API has it: %t, docs/api.md: %t", method, path, has, described)
			}
		}
	}
	for _, k := range kinds {
		if row := "| `" + string(k.code) + "` | " + strconv.Itoa(k.status) + " |"; !strings.Contains(sections["Errors"], row) {
			t.Errorf("docs/api.md does not have %s", row)
		}
	}
	for section, types := range map[string][]any{
		"Errors":                              {Error{}},
		"GET /v1/status":                      {Status{}, StoreStatus{}},
		"GET /v1/attachments":                 {Attachment{}, DNS{}},
		"POST /v1/attachments":                {AttachRequest{}},
		"PUT /v1/attachments/{name}/names":    {NamesRequest{}},
		"POST /v1/attachments/{name}/ports":   {Port{}, PublishRequest{}},
		"DELETE /v1/attachments/{name}/ports": {UnpublishRequest{}},
		"GET /v1/addresses":                   {Address{}},
		"POST /v1/addresses":                  {AddressRequest{}},
		"GET /v1/peers":                       {Peer{}},
	} {
		for _, v := range types {
			for _, f := range reflect.VisibleFields(reflect.TypeOf(v)) {
				name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
				if name != "" && !strings.Contains(sections[section], "`"+name+"`") && !strings.Contains(sections[section], `"`+name+`"`) {
					t.Errorf("docs/api.md, section %s, does not have %q of %T", section, name, v)
				}
			}
		}
	}

	flag := regexp.MustCompile(` (-X|-d|-H) ('[^']*'|\S+)`)
	target := regexp.MustCompile(`http://localhost([^' ]*)`)
	for section, text := range sections {
		if !strings.Contains(section, " /v1/") {
			continue
		}
		examples := regexp.MustCompile(`(?m)^ovl .*$`).FindAllString(text, -1)
		if len(examples) == 0 {
			t.Errorf("section %s of docs/api.md has no example", section)
		}
		for _, line := range examples {
			method, body, header := http.MethodGet, "", make(http.Header)
			for _, m := range flag.FindAllStringSubmatch(line, -1) {
				switch value := strings.Trim(m[2], "'"); m[1] {
				case "-X":
					method = value
				case "-d":
					body = value
					if method == http.MethodGet {
						method = http.MethodPost
					}
				case "-H":
					name, value, _ := strings.Cut(value, ": ")
					header.Set(name, value)
				}
			}
			path := target.FindStringSubmatch(line)[1]
			w := ask(method, path, body, header)
			// A recorder is no connection that could be upgraded.
			if dial := strings.HasPrefix(path, PathDial); w.Code/100 != 2 && !dial || dial && !strings.Contains(w.Body.String(), "cannot become a stream") {
				t.Errorf("%s: %d %s", line, w.Code, w.Body)
			}
			if at, _, _ := strings.Cut(section, "{"); !strings.HasPrefix(method+" "+path, strings.Split(at, "?")[0]) {
				t.Errorf("%s is not an example of %s", line, section)
			}
		}
	}
}
