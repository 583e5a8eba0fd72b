// Errors that keep their kind on the way through the socket: a stable code in JSON, a sentinel in Go.

package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
)

// Code is the kind of an error, stable for programs that read JSON.
type Code string

// The codes.
const (
	CodeNotFound    Code = "not-found"   // no such attachment, process, namespace, config or path
	CodeInUse       Code = "in-use"      // name, address, interface name or namespace is taken
	CodeInvalid     Code = "invalid"     // the request cannot be right, whatever the state of the node
	CodeDenied      Code = "denied"      // another user's process, /dev/net/tun closed, ...
	CodeUnavailable Code = "unavailable" // not now: store away, no lease yet, daemon stopping
	CodeExhausted   Code = "exhausted"   // no free address or subnet
	CodeInternal    Code = "internal"    // a fault of the daemon or of the host
)

// The sentinels, one a code, for errors.Is. Backends may wrap them; the text of an Error does not contain theirs.
var (
	ErrNotFound    = errors.New("not found")
	ErrInUse       = errors.New("in use")
	ErrInvalid     = errors.New("invalid")
	ErrDenied      = errors.New("denied")
	ErrUnavailable = errors.New("unavailable")
	ErrExhausted   = errors.New("exhausted")
	ErrInternal    = errors.New("internal error")
)

// ErrNotRunning is the Client's: nobody listens on the socket. Its errors are ErrUnavailable too.
var ErrNotRunning = errors.New("daemon is not running")

var kinds = []struct {
	code     Code
	sentinel error
	status   int
}{
	{CodeNotFound, ErrNotFound, http.StatusNotFound},
	{CodeInUse, ErrInUse, http.StatusConflict},
	{CodeInvalid, ErrInvalid, http.StatusBadRequest},
	{CodeDenied, ErrDenied, http.StatusForbidden},
	{CodeUnavailable, ErrUnavailable, http.StatusServiceUnavailable},
	{CodeExhausted, ErrExhausted, http.StatusInsufficientStorage},
	{CodeInternal, ErrInternal, http.StatusInternalServerError},
}

// Error is an error of the API, as it stands in JSON. errors.Is(err, ErrInUse) and its like look at Code.
type Error struct {
	Message string `json:"error"`
	Code    Code   `json:"code"`
	cause   error
}

// Error is the message alone.
func (e *Error) Error() string { return e.Message }

// Unwrap gives what the error was made from with %w, if anything; it does not cross the socket.
func (e *Error) Unwrap() error { return e.cause }

// Is says that an Error is the sentinel of its code.
func (e *Error) Is(target error) bool {
	for _, k := range kinds {
		if k.code == e.Code {
			return target == k.sentinel
		}
	}
	return target == ErrInternal
}

// Errorf makes an Error. An error passed with %w stays reachable for errors.Is and errors.As on the daemon's side.
func Errorf(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Message: err.Error(), Code: code, cause: errors.Unwrap(err)}
}

// asError turns any error of a Backend into one that can be sent.
func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return &Error{Message: err.Error(), Code: e.Code} // err may say more than the Error inside it
	}
	for _, k := range kinds {
		if errors.Is(err, k.sentinel) {
			return &Error{Message: err.Error(), Code: k.code}
		}
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return &Error{Message: err.Error(), Code: CodeUnavailable}
	}
	return &Error{Message: err.Error(), Code: CodeInternal}
}

// status is the HTTP status that goes with the code.
func (e *Error) status() int {
	for _, k := range kinds {
		if k.code == e.Code {
			return k.status
		}
	}
	return http.StatusInternalServerError
}
