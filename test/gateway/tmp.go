package main
var loadCases []testCase
