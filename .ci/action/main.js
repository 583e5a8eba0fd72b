// The action's first part.
require('./script')('up.sh');
